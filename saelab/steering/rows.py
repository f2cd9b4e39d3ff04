"""Different interventions on different rows of one batch, so that a generation serves many of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.steering.interventions import Intervention
from saelab.steering.positions import TokenContext, Where


@dataclass(frozen=True)
class OnRows:
    """The tokens that ``where`` names in some rows of the batch: a value of :attr:`Intervention.where`."""

    where: Where
    rows: frozenset[int]

    def __call__(self, context: TokenContext) -> Tensor:
        row_mask = torch.zeros(context.batch, dtype=torch.bool, device=context.device)
        row_mask[sorted(self.rows)] = True
        mask = row_mask[:, None].expand(-1, context.length)
        inner = context.select(self.where)
        if inner is False:
            return torch.zeros_like(mask)
        return mask if inner is True else mask & inner


def part_of(interventions: Intervention | Sequence[Intervention], rows: Sequence[int]) -> list[Intervention]:
    """What the interventions on a batch are on a batch of some of its rows, in the given order."""
    found = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    parts: list[Intervention] = []
    for intervention in found:
        where = intervention.where
        if isinstance(where, OnRows):
            own = frozenset(place for place, row in enumerate(rows) if row in where.rows)
            parts += [replace(intervention, where=replace(where, rows=own))] if own else []
        else:
            parts.append(intervention)
    return parts


def on_rows(interventions: Intervention | Sequence[Intervention], rows: Iterable[int]) -> list[Intervention]:
    """The interventions, limited to these rows of the batch."""
    interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    chosen = frozenset(rows)
    if not chosen or min(chosen) < 0:
        raise UserError("on_rows needs at least one row, counted from 0")
    return [replace(intervention, where=OnRows(intervention.where, chosen)) for intervention in interventions]

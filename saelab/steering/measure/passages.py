"""Calibration on text that the model wrote, for what acts on such text alone: answers, generated tokens, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saelab.errors import UserError
from saelab.lm.tokens import token_ids
from saelab.steering.generation import generate_tokens
from saelab.steering.interventions import Intervention
from saelab.steering.measure.calibration import Calibration, find_strength
from saelab.steering.measure.texts import measure_text


@dataclass(frozen=True)
class Passage:
    """A beginning and what the unsteered model wrote after it, as token ids; ``roles`` are those of a chat."""

    beginning: Sequence[int]
    written: Sequence[int]
    roles: Sequence[int] | None = None


def written_by(
    model: nn.Module,
    beginnings: Sequence[tuple[Sequence[int], Sequence[int] | None]],
    ends: Sequence[int],
    max_new_tokens: int = 40,
) -> list[Passage]:
    """What the unsteered model writes after each beginning (ids, roles), up to ``ends``, the likeliest token each time.

    A beginning after which it writes nothing is left out; UserError where that is all of them.
    """
    found = []
    for ids, roles in beginnings:
        known = None if roles is None else torch.tensor([list(roles)])
        (row,) = generate_tokens(model, torch.tensor([list(ids)]), eos=ends, roles=known, max_new_tokens=max_new_tokens)
        if row:
            found.append(Passage(list(ids), row, roles))
    if not found:
        raise UserError("the model writes nothing after these prompts, so no strength can be calibrated on its text")
    return found


def parted(tokenizer: Any, texts: Sequence[str]) -> list[Passage]:
    """Texts as passages: their first third, one token at least, and the rest as if it was written after it."""
    rows = [token_ids(tokenizer, text) for text in texts]
    return [Passage(row[: max(1, len(row) // 3)], row[max(1, len(row) // 3) :]) for row in rows if len(row) > 1]


def calibrate_on(
    model: nn.Module,
    make: Callable[[float], Sequence[Intervention]],
    passages: Sequence[Passage],
    budget_kl: float,
    limit: float,
    tolerance: float = 0.02,
) -> Calibration:
    """:func:`~saelab.steering.calibrate` with the damage done to the written tokens of ``passages``.

    Interventions act as they do while the model writes: prompt and generated tokens are told apart, schedules count
    from the first written token, and in a chat the messages have their roles. The damage is the mean over passages of
    KL(unsteered || steered) per written token, in nats.
    """

    def damage(strength: float) -> float:
        found = [measure_text(model, p.beginning, p.written, make(strength), p.roles).kl for p in passages]
        return math.fsum(found) / len(found)

    return find_strength(damage, budget_kl, "kl", limit, tolerance)

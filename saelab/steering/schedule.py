"""Schedules: how much of an intervention's change is made at each generated token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.steering.positions import TokenContext


@dataclass(frozen=True)
class Schedule:
    """A weight for each generated token, by which the change of the activations is multiplied.

    ``points`` are pairs (generated token, weight) in increasing order, the first token being 0; between them the
    weight is interpolated linearly, before the first and after the last it stays. The tokens of the prompt have the
    weight of the first point. ``Schedule([(0, 1), (20, 0)])`` fades out over twenty tokens, ``Schedule([(-1, 0), (0,
    1)])`` starts with the first generated token.
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        try:
            points = tuple((float(step), float(weight)) for step, weight in self.points)
        except (TypeError, ValueError):
            raise UserError(
                f"a schedule is a list of pairs (generated token, weight), not {self.points!r}; e.g. [(0, 1), (20, 0)]"
            ) from None
        steps = [step for step, _ in points]
        if not points or not np.isfinite(points).all() or steps != sorted(set(steps)):
            raise UserError(
                f"the schedule {self.points!r} needs finite numbers and generated tokens in increasing order; "
                "e.g. [(0, 1), (20, 0)]"
            )
        object.__setattr__(self, "points", points)

    def __mul__(self, factor: float) -> Schedule:
        """The schedule with all weights multiplied."""
        return Schedule([(step, weight * factor) for step, weight in self.points])

    @property
    def idle(self) -> bool:
        """Whether every weight is zero."""
        return all(weight == 0 for _, weight in self.points)

    @property
    def constant(self) -> bool:
        """Whether every token has the same weight."""
        return len({weight for _, weight in self.points}) == 1

    def weights(self, context: TokenContext) -> Float[Tensor, " length"]:
        """The weight of each token of a forward pass."""
        steps = np.arange(context.past, context.past + context.length) - context.prompt_length
        # A prompt has one weight, although its last tokens are as near to the first point as generated ones.
        places, weights = np.array(self.points).T
        found = np.interp(np.where(steps < 0, places[0], steps), places, weights)
        return torch.tensor(found, dtype=torch.float32, device=context.device)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """``"0:1,20:0"`` as ``Schedule([(0, 1), (20, 0)])``."""
        pairs = [tuple(part.split(":")) for part in text.split(",")]
        try:
            return cls([(float(step), float(weight)) for step, weight in pairs])
        except ValueError:
            raise UserError(
                f"the schedule {text!r} is not a list of TOKEN:WEIGHT; 0:1,20:0 fades out over twenty tokens"
            ) from None

"""A control that does the damage of what it controls for, not only changes of its length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from saelab.errors import UserError
from saelab.steering.interventions import Intervention
from saelab.steering.measure.budget import strength_at
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.texts import measure_text

LARGEST = 256.0  # a control that needs more than this has next to no effect
NONE = 1e-6  # nats per token: as much is rounding


@dataclass(frozen=True)
class EqualDamage:
    """Interventions with all their changes multiplied by ``factor``, so that their damage is that of others."""

    interventions: list[Intervention]
    factor: float
    damage: float  # nats of KL per token
    goal: float  # the damage of the others
    reached: bool  # whether the two are alike within the tolerance


def with_damage_of(
    model: nn.Module,
    control: Sequence[Intervention],
    steered: Sequence[Intervention],
    passage: Passage,
    tolerance: float = 0.05,
) -> EqualDamage:
    """``control`` with its changes multiplied until the damage to ``passage`` is that of ``steered``.

    The damage is the mean over the written tokens of KL(unsteered || steered), in nats. Directions of equal length may
    do very different damage, and a text that is damaged more differs more, whatever the direction means. Where
    ``steered`` does no damage there is none to be equal to, and the control stays as it is.
    """

    def damage(steps: Sequence[Intervention]) -> float:
        return measure_text(model, passage.beginning, passage.written, steps, passage.roles).kl

    def multiplied(factor: float) -> list[Intervention]:
        return [step.times(factor) for step in control]

    def of_control(factor: float) -> float:
        try:
            return damage(multiplied(factor))
        except UserError:  # it is beyond what the model's numbers hold; ``steered`` has shown that all else is well
            return math.inf

    goal = damage(steered)
    if goal < NONE:
        return EqualDamage(list(control), 1.0, of_control(1.0), goal, False)
    factor, found, reached = strength_at(of_control, goal, 1.0, tolerance=tolerance, limit=LARGEST)
    return EqualDamage(multiplied(factor), factor, found, goal, reached)

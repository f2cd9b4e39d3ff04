"""Random directions as a control: the same kind of change, with the damage of what it controls for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from saelab.errors import UserError
from saelab.steering.directions import random_direction
from saelab.steering.interventions import Intervention, LatentIntervention, VectorIntervention
from saelab.steering.measure.budget import strength_at
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.texts import measure_text
from saelab.steering.operations import Add, ProjectOut
from saelab.steering.vectors import SteeringVector

LARGEST = 256.0  # a control that needs more than this has next to no effect
NONE = 1e-6  # nats per token: as much is rounding


def random_controls(steps: Sequence[Intervention], seed: int = 0) -> list[Intervention]:
    """The same changes along random directions, on the same tokens and at the same layers.

    A vector operation is applied to a random direction of its vector's norm. For an operation on a latent, a random
    direction is added at the length that the latent's activation is set to, or projected out where it has no such
    length. Steps along one direction, as at several layers, share one random direction. UserError for an operation that
    has neither a vector nor a latent.
    """
    drawn: dict[Hashable, int] = {}

    def instead_of(vector: SteeringVector) -> SteeringVector:
        key = vector.direction.float().cpu().numpy().tobytes()
        return random_direction(vector, drawn.setdefault(key, seed + len(drawn)))

    return [_random_control(step, instead_of) for step in steps]


def _random_control(step: Intervention, instead_of: Any) -> Intervention:
    if isinstance(step, VectorIntervention):
        held = getattr(step, name := step.parts[0])
        one = isinstance(held, SteeringVector)
        return dataclasses.replace(step, **{name: instead_of(held) if one else [instead_of(v) for v in held]})
    if not isinstance(step, LatentIntervention):
        raise UserError(f"{type(step).__name__} acts along no vector and on no latent, so it has no random control")
    latent = SteeringVector.from_latent(step.run, step.latent, step.pole or 1)
    limits = {name: getattr(step, name) for name in ("where", "skip_first", "hook_name", "when", "schedule")}
    direction = instead_of(latent)
    if step.amount is None or not step.amount.units:
        return ProjectOut(direction, **limits)
    activation = step.activation(getattr(step, step.amount.field), step.pole or 1)
    return Add(direction, activation * latent.norm, **limits)


@dataclass(frozen=True)
class EqualDamage:
    """Interventions with all their changes multiplied by ``factor``, so that their damage is that of others."""

    interventions: list[Intervention]
    factor: float
    damage: float  # nats of KL per token
    goal: float  # the damage of the others
    reached: bool  # whether the two are alike within the tolerance

    @property
    def sentence(self) -> str:
        """What was reached, for people."""
        kl = f"KL {self.damage:.3g}"
        if self.goal < NONE:
            return f"the steering does no damage to the unsteered text, so the control keeps its lengths: {kl}"
        alike = f"{kl} nats per token on the unsteered text, where the steering has {self.goal:.3g}"
        said = f"changes of ×{self.factor:.3g}: {alike}"
        return said if self.reached else f"not of equal damage: {said}"


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

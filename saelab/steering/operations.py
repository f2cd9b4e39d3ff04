"""The steering operations: Add and ProjectOut act along vectors; Scale, Clamp, MinClamp and Ablate on one latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.steering.interventions import Amount, LatentIntervention, VectorIntervention
from saelab.steering.vectors import SteeringVector, Strength


@dataclass(frozen=True, eq=False)
class Add(VectorIntervention, operation="add"):
    """Add the direction, times a strength.

    ``x + length * direction``; see :class:`SteeringVector` for the units a strength may have.
    """

    amount: ClassVar[Amount | None] = Amount("strength", "strength", 1.0, 4.0, 0.05, units=True, signed=True)

    vector: SteeringVector
    strength: Strength = "1raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vector.length(self.strength)  # a unit that is not known is refused here, not in the middle of a generation

    @property
    def length(self) -> float:
        """The strength in units of the activations."""
        return self.vector.length(self.strength)

    @property
    def idle(self) -> bool:
        return self.length == 0

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"length": self.length}

    def prepare(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        shift = (self.vector.direction * self.length).to(like)
        if not bool(shift.isfinite().all()):
            dtype = str(like.dtype).removeprefix("torch.")
            raise UserError(f"strength {self.strength} overflows {dtype}, in which the model runs; lower it")
        return lambda x: x + shift


@dataclass(frozen=True, eq=False)
class ProjectOut(VectorIntervention, operation="project-out"):
    """Remove the component along the direction (directional ablation).

    With several vectors it is the component in their span; ``strength`` is the fraction removed.
    """

    amount: ClassVar[Amount | None] = Amount("strength", "fraction", 1.0, 1.0, 0.05)
    parts: ClassVar[tuple[str, ...]] = ("vectors",)

    vectors: SteeringVector | Sequence[SteeringVector]
    strength: float = 1.0

    def __post_init__(self) -> None:
        if len({(v.hook_name, v.d_in) for v in self.directions}) != 1:
            raise UserError("ProjectOut takes one or more vectors of the same hook point and width")
        super().__post_init__()

    @property
    def idle(self) -> bool:
        return self.strength == 0

    def prepare(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        directions = torch.stack([vector.direction for vector in self.directions]).double()
        # Vectors that nearly repeat each other span one axis, not two.
        _, sizes, axes = torch.linalg.svd(directions, full_matrices=False)
        basis = axes[sizes > 1e-6 * sizes[0]].to(like)
        return lambda x: x - self.strength * ((x @ basis.T) @ basis)


@dataclass(frozen=True, eq=False)
class Scale(LatentIntervention, operation="scale"):
    """Multiply the latent's own activation where it fires."""

    amount: ClassVar[Amount | None] = Amount("factor", "factor", 2.0, 8.0, 0.1)

    factor: float = 2.0

    @property
    def idle(self) -> bool:
        return self.factor == 1 and self.keep_error

    def change(self, values: Tensor) -> Tensor:
        return values * self.factor


@dataclass(frozen=True, eq=False)
class Clamp(LatentIntervention, operation="clamp"):
    """Set the latent's activation to a value on every token, whether it fires there or not.

    ``value`` is an activation, or a strength with a unit: ``"0.8max"`` of the latent's maximum. With ``pole=-1`` that
    is the largest magnitude on the negative pole, and the value is negative.
    """

    amount: ClassVar[Amount | None] = Amount("value", "activation", 1.0, 4.0, 0.05, units=True)

    value: Strength = "1max"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.target  # a unit that is not known is refused here, not in the middle of a generation

    @cached_property
    def target(self) -> float:
        """The activation to set."""
        return self.activation(self.value, self.pole or 1)

    def saved_settings(self) -> dict[str, Any]:
        return self.settings() | {"value": self.target, "given": self.value}

    def edit(self, values: Tensor) -> Tensor:
        return torch.full_like(values, self.target)


@dataclass(frozen=True, eq=False)
class MinClamp(Clamp, operation="min-clamp"):
    """Raise the latent's activation to a value where it lies below it (on the negative pole: above it)."""

    def edit(self, values: Tensor) -> Tensor:
        return values.clamp(max=self.target) if self.target < 0 else values.clamp(min=self.target)


@dataclass(frozen=True, eq=False)
class Ablate(LatentIntervention, operation="ablate"):
    """Set the latent's activation to zero."""

    def change(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

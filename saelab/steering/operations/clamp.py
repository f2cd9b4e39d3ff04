"""Set a latent's activation, or raise it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from saelab.steering.interventions import Amount, LatentIntervention
from saelab.steering.vectors import Strength


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

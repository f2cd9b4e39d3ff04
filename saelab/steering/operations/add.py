"""Add a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from saelab.errors import UserError
from saelab.steering.interventions import Amount, VectorIntervention
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

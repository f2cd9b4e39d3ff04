"""Limit the component along a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saelab.errors import UserError
from saelab.steering.interventions import Amount, VectorIntervention
from saelab.steering.vectors import SteeringVector, Strength


@dataclass(frozen=True, eq=False)
class Cap(VectorIntervention, operation="cap"):
    """Limit the component along the direction: lower it to the limit where it is larger.

    ``x - max(x @ direction - limit, 0) * direction``; see :class:`SteeringVector` for the units a limit may have. With
    a negated vector and limit the component is held from below: ``Cap(-vector, -2.0)`` keeps it at 2 or more.
    """

    amount: ClassVar[Amount | None] = Amount("limit", "limit", 1.0, 4.0, 0.05, units=True, signed=True)

    vector: SteeringVector
    limit: Strength = "1raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vector.length(self.limit)  # a unit that is not known is refused here, not in the middle of a generation

    def prepare(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        direction, limit = self.vector.direction.to(like), self.vector.length(self.limit)
        if not bool(like.new_tensor(limit).isfinite()):
            dtype = str(like.dtype).removeprefix("torch.")
            raise UserError(f"limit {self.limit} overflows {dtype}, in which the model runs; lower it")
        return lambda x: x - ((x @ direction) - limit).clamp(min=0)[..., None] * direction

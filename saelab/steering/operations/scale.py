"""Multiply a latent's activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saelab.steering.interventions import Amount, LatentIntervention


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

"""Remove the component along a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.steering.interventions import Amount, VectorIntervention
from saelab.steering.vectors import SteeringVector


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

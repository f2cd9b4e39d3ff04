"""Set a latent's activation to zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.steering.interventions import LatentIntervention


@dataclass(frozen=True, eq=False)
class Ablate(LatentIntervention, operation="ablate"):
    """Set the latent's activation to zero."""

    def change(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

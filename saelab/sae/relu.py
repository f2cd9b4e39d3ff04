"""The plain SAE: ReLU, an L1 penalty, unit-norm dictionary rows (Cunningham et al., 2023; Bricken et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels import SelectedPreActs
from saelab.sae.penalty import L1SAE
from saelab.sparse import SparseCode


class ReLUSAE(L1SAE, variant="relu"):
    """``z = ReLU(u)``; minimises ``||x - recon||^2 + l1 * sum_j z_j``."""

    saelens = "standard"

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return self.select_above(x, 0.0)

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        super().before_fine_tuning(scale)
        norms = self.take_norms()
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)

    def extra_losses(self, x: Tensor, code: SparseCode, error: Tensor) -> dict[str, Tensor]:
        return {"l1": self.l1 * self.pressure() * code.values.sum() / code.n}

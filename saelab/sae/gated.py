"""Gated SAE: one half of the encoder decides which latents are active, the other how strongly (Rajamanoharan et al.,
2024, arXiv 2404.16014).

The two halves share their directions. The L1 penalty shrinks the gate only; an auxiliary reconstruction from the gate,
through a frozen decoder, gives the gate its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saelab import kernels
from saelab.kernels import SelectedPreActs
from saelab.sae.penalty import PenaltySAE
from saelab.sparse import SparseCode


class GatedSAE(PenaltySAE, variant="gated"):
    """``z = 1[gate > 0] * ReLU(exp(r_mag) * h + b_mag)`` with ``h = W_enc^T (x - b_dec)`` and ``gate = h + b_enc``."""

    saelens = "gated"
    scaled = (*PenaltySAE.scaled, "b_mag")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1: float = 0.1,
        penalty_warmup: float = 0.1,
        target_l0: int | float | None = None,
        adapt_rate: float = 1e-3,
    ) -> None:
        """
        Args:
            l1: Weight of the L1 penalty on the gate, for activations of unit mean square norm.
            penalty_warmup: Share of the steps over which the penalty rises from 0.
            target_l0: Let the weight follow this number of active latents per token.
            adapt_rate: Relative change of the weight per step when it follows a target.
        """
        super().__init__(
            d_in,
            d_sae,
            penalty_warmup,
            target_l0,
            adapt_rate,
            l1=l1,
            penalty_warmup=penalty_warmup,
            target_l0=target_l0,
            adapt_rate=adapt_rate,
        )
        self.l1 = l1
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return self.select_above(x, 0.0)

    def activate(self, pre_acts: Tensor, indices: Tensor) -> Tensor:
        h = pre_acts - self.b_enc[indices]
        return (self.r_mag.exp()[indices] * h + self.b_mag[indices]).relu()

    def extra_losses(self, x: Tensor, code: SparseCode, error: Tensor) -> dict[str, Tensor]:
        """The L1 penalty on the gate and the reconstruction from it; encodes once more, the code has no gates."""
        with torch.no_grad():
            selected = self.select(x, None)
        gate = kernels.pre_acts_at(x, self.W_enc, self.b_enc, self.b_in, selected)
        frozen = self.W_dec.detach(), self.b_dec.detach()
        from_gate, _ = kernels.sse(x, gate, selected.indices, selected.row_ptr, *frozen)
        return {"l1": self.l1 * self.pressure() * gate.sum() / code.n, "gate": from_gate.mean()}

"""TopK: the k largest pre-activations of each token (Gao et al., 2024, arXiv 2406.04093).

Selection happens on the raw pre-activations, then ReLU: when fewer than ``k`` are positive the surplus is stored as
zero and counts as inactive, so L0 <= k.
"""

from __future__ import annotations

from torch import Tensor

from saelab import kernels
from saelab.kernels import SelectedPreActs
from saelab.sae.base import LinearSAE, check_k


class TopK(LinearSAE, variant="topk"):
    """``z = ReLU(TopK_k(W_enc^T (x - b_dec) + b_enc))``."""

    saelens = "topk"

    def __init__(self, d_in: int, d_sae: int, k: int = 32) -> None:
        """
        Args:
            k: Latents per token.
        """
        super().__init__(d_in, d_sae, k=check_k(k, d_sae))
        self.k = k

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return kernels.select_topk(x, self.W_enc, self.b_enc, self.b_in, self.k)

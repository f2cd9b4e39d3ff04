"""The plain SAE: ReLU, an L1 penalty, unit-norm dictionary rows (Cunningham et al., 2023; Bricken et al., 2023)."""

from __future__ import annotations

from torch import Tensor

from saelab.kernels import SelectedPreActs
from saelab.sae.penalty import PenaltySAE
from saelab.sparse import SparseCode


class ReLUSAE(PenaltySAE, variant="relu"):
    """``z = ReLU(u)``; minimises ``||x - recon||^2 + l1 * sum_j z_j``."""

    saelens = "standard"

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
            l1: Weight of the L1 penalty, for activations of unit mean square norm.
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

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return self.select_above(x, 0.0)

    def extra_losses(self, x: Tensor, code: SparseCode, error: Tensor) -> dict[str, Tensor]:
        return {"l1": self.l1 * self.pressure() * code.values.sum() / code.n}

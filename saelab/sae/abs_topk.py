"""AbsTopK: the k largest magnitudes, sign kept (Zhu, Khalili and Zhu, 2025, arXiv 2510.00404).

One proximal step for ``||z||_0 <= k`` without the constraint ``z >= 0``: a latent stands for two opposite directions
of a concept. The paper selects per token; its authors' pre-release code selected over the batch, which ``scope``
offers. The paper's encoder has no pre-bias (``apply_b_dec_to_input=False``), that code subtracts ``b_dec``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from saelab import kernels
from saelab.kernels import SelectedPreActs
from saelab.sae.threshold import BatchBudgetSAE
from saelab.sparse import SparseCode


class AbsTopK(BatchBudgetSAE, variant="abs_topk"):
    """``z_i = u_i`` where ``|u_i|`` is among the k largest, else 0, with ``u = W_enc^T (x - b_dec) + b_enc``."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int = 32,
        scope: Literal["token", "batch"] = "token",
        apply_b_dec_to_input: bool = True,
    ) -> None:
        """
        Args:
            k: Latents per token, of either sign; on average over the batch if the scope is the batch.
            scope: Select per token (the paper), or over the batch in training and by |u| > threshold afterwards.
            apply_b_dec_to_input: Subtract b_dec before encoding; the paper's encoder does not.
        """
        super().__init__(d_in, d_sae, k, signed=True, scope=scope, apply_b_dec_to_input=apply_b_dec_to_input)
        self.scope: Literal["token", "batch"] = scope
        if scope == "token":
            self.saelens = "abstopk"

    @property
    def budget_over(self) -> Literal["token", "batch"]:
        return self.scope

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        if self.scope == "batch":
            return super().select(x, grads)
        return kernels.select_topk(x, self.W_enc, self.b_enc, self.b_in, int(self.k), signed=True)

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        if self.scope == "batch":
            super().observe(x, code, grads)

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        if self.scope == "batch":
            super().calibrate(batches)

    def inference_threshold(self) -> Tensor | None:
        return super().inference_threshold() if self.scope == "batch" else None

    def diagnostics(self) -> dict[str, float]:
        return super().diagnostics() if self.scope == "batch" else {}

"""AbsTopK: the k largest magnitudes, sign kept (Zhu, Khalili and Zhu, 2025, arXiv 2510.00404).

One proximal step for ``||z||_0 <= k`` without the constraint ``z >= 0``: a latent stands for two opposite directions
of a concept. The paper selects per token; what its authors' pre-release code does, a selection over the batch, is
``batch_topk`` with ``signed``. The paper's encoder has no pre-bias (``apply_b_dec_to_input=False``), that code
subtracts ``b_dec``.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from saelab import kernels
from saelab.kernels import SelectedPreActs
from saelab.sae.budget import BudgetSAE


class AbsTopK(BudgetSAE, variant="abs_topk"):
    """``z_i = u_i`` where ``|u_i|`` is among the k largest, else 0, with ``u = W_enc^T (x - b_dec) + b_enc``."""

    saelens = "abstopk"
    signed = True

    def __init__(self, d_in: int, d_sae: int, k: int = 32, apply_b_dec_to_input: bool = True, **options: Any) -> None:
        """
        Args:
            k: Latents per token, of either sign.
            apply_b_dec_to_input: Subtract b_dec before encoding; the paper's encoder does not.
        """
        super().__init__(d_in, d_sae, k, **options)

    @property
    def budget_over(self) -> Literal["token"]:
        return "token"

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return kernels.select_topk(x, self.W_enc, self.b_enc, self.b_in, round(self.budget), signed=True)

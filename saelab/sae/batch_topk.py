"""BatchTopK: the n * k largest pre-activations of a batch (Bussmann et al., 2024, arXiv 2412.06410).

Hard tokens may take more than k latents, easy ones fewer. At inference a threshold stands in for the batch.
"""

from __future__ import annotations

from typing import Any

from saelab.sae.threshold import BatchBudgetSAE


class BatchTopK(BatchBudgetSAE, variant="batch_topk"):
    """``z = ReLU(u)`` where ``u`` is among the ``n * k`` largest of the batch; ``u > threshold`` at inference."""

    only_if_set = (*BatchBudgetSAE.only_if_set, "apply_b_dec_to_input")

    def __init__(self, d_in: int, d_sae: int, *, apply_b_dec_to_input: bool = True, **options: Any) -> None:
        """
        Args:
            apply_b_dec_to_input: Subtract b_dec before encoding; AbsTopK's paper does not.
        """
        super().__init__(d_in, d_sae, **options)

"""BatchTopK: the n * k largest pre-activations of a batch (Bussmann et al., 2024, arXiv 2412.06410).

Hard tokens may take more than k latents, easy ones fewer. At inference a threshold stands in for the batch.
"""

from __future__ import annotations

from saelab.sae.threshold import BatchBudgetSAE


class BatchTopK(BatchBudgetSAE, variant="batch_topk"):
    """``z = ReLU(u)`` where ``u`` is among the ``n * k`` largest of the batch; ``u > threshold`` at inference."""

    def __init__(self, d_in: int, d_sae: int, k: int | float = 32, signed: bool = False) -> None:
        """
        Args:
            k: Latents per token, on average over the batch.
            signed: Keep the largest magnitudes with their sign.
        """
        super().__init__(d_in, d_sae, k, signed)
        self.config["signed"] = signed

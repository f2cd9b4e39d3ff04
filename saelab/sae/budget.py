"""Base class of the variants with a budget of k latents per token: k itself, and its warm-up."""

from __future__ import annotations

from typing import Any

from saelab.errors import UserError
from saelab.sae.base import check_k, check_share, progress
from saelab.sae.linear import LinearSAE


class BudgetSAE(LinearSAE):
    """An SAE with ``k`` latents per token, and optionally more during the first steps."""

    tunable = ("k_start", "k_warmup")
    only_if_set = ("k_start", "k_warmup")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int | float,
        k_start: int | None = None,
        k_warmup: float = 0.0,
        **options: Any,
    ) -> None:
        """
        Args:
            k: Latents per token.
            k_start: Latents per token at the first step of a warm-up; by default 4 k, at most d_sae.
            k_warmup: Share of the steps over which the number falls from k-start to k; 0 trains with k throughout.
        """
        super().__init__(d_in, d_sae, **options)
        self.k, self.k_warmup = check_k(k, d_sae), check_share("k_warmup", k_warmup)
        if k_start is not None and not 1 <= k_start <= d_sae:
            raise UserError(f"k_start={k_start} is outside 1..d_sae={d_sae}")
        self.k_start = min(4 * k, d_sae) if k_start is None else k_start
        self.warmed_up = 1.0  # share of the warm-up that is done

    @property
    def budget(self) -> int | float:
        """Latents per token: ``k``, or what the warm-up has reached in training."""
        if not self.training or self.warmed_up == 1:
            return self.k
        return self.k_start + (self.k - self.k_start) * self.warmed_up

    def schedule(self, step: int, n_steps: int) -> None:
        self.warmed_up = progress(self.k_warmup, step, n_steps)

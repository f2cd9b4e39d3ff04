"""Mutual Choice: tokens and latents share one budget (Ayonrinde, 2024, arXiv 2411.02124).

The allocation is that of BatchTopK: the ``n * k`` largest affinities. What is new is ``aux_zipf``, AuxK widened from
dead latents to those that fire far less than a Zipf law fitted to all densities expects. Only the abstract and the
reviews of the paper were available: the law's form, the meaning of under-used (``under_used``), the weights and the
rule at inference (a global threshold) are our choices, and no number of that paper is reproduced here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import UserError
from saelab.sae import zipf
from saelab.sae.threshold import BatchBudgetSAE, RunningMean
from saelab.sparse import SparseCode

REFIT = 100  # steps between fits of the law


class MutualChoice(BatchBudgetSAE, variant="mutual_choice"):
    """The ``n * k`` largest of ``ReLU(u)`` in a batch; AuxK also for latents far below the Zipf law's density."""

    tunable = (*BatchBudgetSAE.tunable, "zipf_weight", "under_used", "density_window")
    zipf: Tensor
    seen: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        zipf_weight: float = 1 / 32,
        under_used: float = 0.1,
        density_window: int = 1_000_000,
        **options: Any,
    ) -> None:
        """
        Args:
            zipf_weight: Weight of the aux_zipf loss; 0 turns it off.
            under_used: A latent is under-used below this share of the density that the law gives its rank.
            density_window: Tokens over which densities are averaged.
        """
        if density_window < 1:
            raise UserError(f"density_window={density_window} must be at least 1 token")
        super().__init__(d_in, d_sae, **options)
        self.zipf_weight, self.under_used, self.density_window = zipf_weight, under_used, density_window
        self.density = RunningMean(d_sae)
        self.register_buffer("zipf", torch.zeros(3, dtype=torch.float64))  # q, s and R^2 of the last fit
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # batches since the start

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        super().observe(x, code, grads)
        self.density.update(code.firing_counts() / code.n, rate=-math.expm1(-code.n / self.density_window))
        self.seen += 1
        if self.seen % REFIT == 0:
            self.fit_law()

    @torch.no_grad()
    def fit_law(self) -> None:
        """Fit the Zipf law to the densities measured so far."""
        self.zipf.copy_(torch.tensor(zipf.fit(self.gather(self.density.mean()).flatten())))

    def law(self) -> Float[Tensor, " d_sae"]:
        """The density that the law gives each latent, by its rank; the whole dictionary's add up to ``k``."""
        density = self.gather(self.density.mean())
        expected = zipf.rates(zipf.Zipf(*self.zipf.tolist()), density.numel(), self.k)
        return zipf.by_rank(density.flatten(), expected).view_as(density)[self.part]

    def aux_latents(self, dead: Int[Tensor, " m"], weight: float) -> dict[str, tuple[float, Tensor]]:
        latents = dead
        if self.seen >= REFIT:  # before the first fit only the dead are known
            mark = self.density.mean() < self.under_used * self.law()
            mark[dead] = True
            latents = mark.nonzero().flatten()
        return {**super().aux_latents(dead, weight), "aux_zipf": (self.zipf_weight, latents)}

    def diagnostics(self) -> dict[str, float | Tensor]:
        q, s, r2 = self.zipf.unbind()
        return {**super().diagnostics(), "zipf_q": q, "zipf_s": s, "zipf_r2": r2}

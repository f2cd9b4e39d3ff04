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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import UserError
from saelab.sae import zipf
from saelab.sae.threshold import BatchBudgetSAE, RunningMean
from saelab.sparse import SparseCode

REFIT = 100  # steps between fits of the law
ROUNDING = 1e-9  # relative, far more than that of densities in float64


class MutualChoice(BatchBudgetSAE, variant="mutual_choice"):
    """The ``n * k`` largest of ``ReLU(u)`` in a batch; AuxK also for latents far below the Zipf law's density."""

    tunable = (*BatchBudgetSAE.tunable, "zipf_weight", "under_used", "density_window")
    on_host = (*BatchBudgetSAE.on_host, "seen")
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
        # Batches since the start.
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device="cpu"))
        self._expected: tuple[Tensor, int, Tensor] | None = None  # the law's buffer, its version, densities by rank

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        super().observe(x, code, grads)
        counts, n = self.share.sum(code.firing_counts()), code.n * self.share.parts
        self.density.update(counts / n, rate=-math.expm1(-n / self.density_window))
        seen = self.seen.numpy()
        seen += 1
        if seen % REFIT == 0:
            self.fit_law()

    @property
    def n_seen(self) -> int:
        """Batches since the start."""
        return int(self.seen.numpy())

    @torch.no_grad()
    def fit_law(self) -> None:
        """Fit the Zipf law to the densities measured so far."""
        self.zipf.copy_(torch.tensor(zipf.fit(self.gather(self.density.mean()).flatten())))

    def law(self) -> Float[Tensor, " d_sae"]:
        """The density that the law gives each latent, by its rank; the whole dictionary's add up to ``k``."""
        density = self.gather(self.density.mean())
        expected = self._by_rank(density.numel())
        return zipf.by_rank(density.flatten(), expected).view_as(density)[self.part]

    def _by_rank(self, d_sae: int) -> Float[Tensor, " d_sae"]:
        """The law's densities in falling order, on the device; computed once for each fit."""
        held = self._expected
        if held is None or held[0] is not self.zipf or held[1] != self.zipf._version or held[2].numel() != d_sae:
            expected = zipf.rates(zipf.Zipf(*self.zipf.tolist()), d_sae, self.k).to(self.zipf)
            held = self._expected = (self.zipf, self.zipf._version, expected)
        return held[2]

    def aux_latents(self, dead: Int[Tensor, " m"], weight: float) -> dict[str, tuple[float, Tensor]]:
        is_dead = torch.zeros(self.d_sae, dtype=torch.bool, device=self.device)
        marks = self.aux_marks(is_dead.index_fill_(0, dead, True), weight)
        return {name: (each, mark.nonzero().flatten()) for name, (each, mark) in marks.items()}

    def aux_marks(self, dead: Bool[Tensor, " d_sae"], weight: float) -> dict[str, tuple[float, Tensor]]:
        latents = dead
        if self.n_seen >= REFIT:  # before the first fit only the dead are known
            latents = dead | (self.density.mean() < self.under_used * self.law())
        return {"auxk": (weight, dead), "aux_zipf": (self.zipf_weight, latents)}

    def aux_ahead(self, n: int, steps: int) -> Bool[Tensor, " d_sae"]:
        """All latents from the first rank on whose density can fall below the mark of its rank.

        A density falls to a share ``least`` of itself at most. Let a latent be marked later, at density ``d``. More
        latents than those that now exceed ``d / least`` cannot be missing above it, so its rank then is not higher than
        that of ``d / least`` now, and the density there can fall below the mark, too.
        """
        density, weight = self.density.mean(), self.density.weight
        if self.n_seen < REFIT:
            return torch.zeros_like(density, dtype=torch.bool)
        kept = math.exp(-steps * n / self.density_window)
        least = (weight * kept / (1 - (1 - weight) * kept)).amin() * (1 - ROUNDING)
        order = density.sort(descending=True, stable=True).indices
        below = density[order] * least < self.under_used * (1 + ROUNDING) * self._by_rank(density.numel())
        return torch.empty_like(below).scatter_(0, order, below.cumsum(0) > 0)

    def aux_renews(self, step: int) -> bool:
        return self.n_seen % REFIT == 0  # the law has just been fitted

    def diagnostics(self) -> dict[str, float | Tensor]:
        q, s, r2 = self.zipf.unbind()
        return {**super().diagnostics(), "zipf_q": q, "zipf_s": s, "zipf_r2": r2}

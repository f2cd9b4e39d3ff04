"""How often latents fire: dead and dense shares, the histogram, and Zipf's law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.metrics.intervals import Array, Estimate, proportion
from saelab.sae import zipf
from saelab.sparse import SparseCode

DENSE, ULTRA_DENSE = 0.1, 0.5  # shares of tokens on which such a latent fires
# log10(density); the first bin holds the dead latents, drawn at -10
EDGES = [-10.0, *np.linspace(-6, 0, 25).tolist()]


class FiringCounts:
    """On how many tokens each latent is active, by sign; a token counts when the value is not 0."""

    def __init__(self, d_sae: int) -> None:
        self.positive = torch.zeros(d_sae, dtype=torch.int64)
        self.negative = torch.zeros(d_sae, dtype=torch.int64)
        self.n = 0

    def update(self, code: SparseCode) -> None:
        """Count the firings of another batch of tokens."""
        self.positive += torch.bincount(code.indices[code.values > 0].cpu(), minlength=code.d_sae)
        self.negative += torch.bincount(code.indices[code.values < 0].cpu(), minlength=code.d_sae)
        self.n += code.n

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each latent is active, ``[d_sae]`` float64."""
        if self.n == 0:
            raise UserError("no tokens were counted, so latents have no density; evaluate at least one token")
        return (self.positive + self.negative).double() / self.n

    def estimates(self) -> dict[str, Estimate]:
        """Shares of latents, each naming the window of tokens it was counted on."""
        density, total = self.density, self.density.numel()
        window = f"a window of {self.n:,} tokens"
        shares = {
            "dead_fraction": (density == 0, f"share of latents that never fire (code != 0) in {window}"),
            "dense_fraction": (density > DENSE, f"share of latents active on more than 10 % of {window}"),
            "ultra_dense_fraction": (density > ULTRA_DENSE, f"share of latents active on more than half of {window}"),
        }
        return {name: proportion(int(mask.sum()), total, "latent", formula) for name, (mask, formula) in shares.items()}

    def histogram(self) -> dict[str, Any]:
        """Counts of latents over log10(density), dead latents in the first bin."""
        logs = np.log10(np.maximum(self.density.numpy(), 1e-10))
        logs = np.where(logs > -10, np.maximum(logs, EDGES[1]), logs)
        counts, _ = np.histogram(logs, bins=EDGES)
        return {"log10_density_edges": EDGES, "latents": counts.tolist(), "tokens": self.n}


@dataclass(frozen=True)
class ZipfFit:
    """``log density = log C - s log(rank + q)`` (Zipf-Mandelbrot; q = 0 is Zipf), over ranks 1 .. ``last_rank``."""

    s: float
    q: float
    log_C: float
    r2: float
    last_rank: int
    n_alive: int
    breaks_at: int | None

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


def zipf_fit(density: Array, share: float = 0.8, offset: bool = True, tolerance: float = 2.0) -> ZipfFit:
    """Fit Zipf's law to the sorted densities, as the choice SAEs fit it (:func:`saelab.sae.zipf.fit`).

    The lower tail falls below the law, so only the ``share`` of living latents of highest density is fitted.
    ``breaks_at`` is the first rank beyond which the densities stay below the fit by more than the factor
    ``tolerance`` (None: they never do).
    """
    found = torch.from_numpy(density)
    alive = np.sort(density[density > 0])[::-1]
    last = int(share * alive.size)
    if last < 10:
        raise UserError(f"{alive.size} living latents are too few for a Zipf fit; it needs at least {int(10 / share)}")
    law = zipf.fit(found, share, offset)
    log_C = zipf.log_constant(law, found, share)
    ranks = np.arange(1, alive.size + 1)
    below = np.log(alive) < log_C - law.s * np.log(ranks + law.q) - np.log(tolerance)
    breaks = int(ranks[~below][-1]) + 1 if (~below).any() else 1
    return ZipfFit(
        s=law.s,
        q=law.q,
        log_C=log_C,
        r2=law.r2,
        last_rank=last,
        n_alive=int(alive.size),
        breaks_at=breaks if breaks <= alive.size else None,
    )


def lognormal_r2(density: Array, share: float = 0.8) -> float:
    """R^2, in log density, of a lognormal law fitted to the ranks that :func:`zipf_fit` is fitted to, with its weights.

    Log density is linear in the normal quantile of the share of living latents above: two parameters, as Zipf's law.
    """
    from scipy.special import ndtri

    ranks, y, weight, n = (np.asarray(part) for part in zipf.points(torch.from_numpy(density), share))
    if n < 3:
        raise UserError(f"{int((density > 0).sum())} living latents are too few for a fit; it needs at least four")
    t = -ndtri((ranks - 0.5) / (density > 0).sum())
    t, y = t - weight @ t, y - weight @ y
    slope = weight @ (t * y) / (weight @ t**2)
    return float(1 - weight @ (y - slope * t) ** 2 / (weight @ y**2))

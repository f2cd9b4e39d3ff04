"""The Zipf-Mandelbrot law of latent densities: fit it, and divide a batch's budget by it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.devices import in_float64, widest_float

TAIL = 0.2  # share of the live latents, the rarest, that the fit leaves out: densities fall below the law there
OFFSETS = 256  # values of q that are tried
GRID = 2**20
POINTS = 4096  # ranks that are fitted at most, evenly spaced in their logarithm


class Zipf(NamedTuple):
    """``density(rank) ~ (rank + q) ** -s`` for rank = 1, 2, ...; ``r2`` is of the fit in log density."""

    q: float
    s: float
    r2: float


@torch.no_grad()
def fit(density: Float[Tensor, " d_sae"], share: float = 1 - TAIL, offset: bool = True) -> Zipf:
    """Least squares of log density on ``log(rank + q)``, for the q that fits best; ranks by falling density.

    Ranks weigh alike in log rank; otherwise the fit would see only the tail, where most ranks are.
    Latents that never fired are left out, and of the others all but the ``share`` of highest density. With fewer than
    three ranks left, or where no falling law fits, the law is uniform (s = 0) and ``r2`` is 0. Without ``offset`` q is
    0: Zipf's law proper.
    """
    ranks, y, weight, n = points(density, share)
    if n < 3:
        return Zipf(0.0, 0.0, 0.0)
    q = y.new_zeros(1)
    if offset:
        q = torch.cat([q, torch.logspace(-2, 1, OFFSETS, dtype=torch.float64, device=y.device) * n / 10])
    t = (ranks + q[:, None]).log()
    t, y = t - (t @ weight)[:, None], y - y @ weight
    slope = t @ (weight * y) / (t.square() @ weight)
    spread = y.square() @ weight
    r2 = 1 - (y - slope[:, None] * t).square() @ weight / spread
    best = int(r2.nan_to_num(-1.0).argmax())
    if spread == 0 or slope[best] >= 0:
        return Zipf(0.0, 0.0, 0.0)
    return Zipf(q[best].item(), -slope[best].item(), r2[best].item())


@torch.no_grad()
def log_constant(law: Zipf, density: Float[Tensor, " d_sae"], share: float = 1 - TAIL) -> float:
    """``log C`` of ``density = C (rank + q) ** -s`` by the same least squares that found ``law``."""
    ranks, y, weight, _ = points(density, share)
    return float(weight @ (y + law.s * (ranks + law.q).log()))


def points(density: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Ranks that a law is fitted to, their log densities, their weights (which add up to 1), and how many ranks there
    were to choose from: all but the rarest of the latents that fire."""
    density = in_float64(density)
    live = density[density > 0].sort(descending=True).values
    n = int(live.numel() * share)
    ranks = torch.arange(1, n + 1, device=density.device)
    if n > POINTS:
        ranks = torch.linspace(0, math.log(n), POINTS, dtype=torch.float64, device=live.device)
        ranks = ranks.exp().round().long().unique()
    weight = torch.cat([ranks.diff(), ranks.new_ones(min(n, 1))]) / ranks.double()
    return ranks, live[ranks - 1].log(), weight / weight.sum(), n


def rates(law: Zipf, d_sae: int, k: int | float) -> Float[Tensor, " d_sae"]:
    """Densities by rank that follow ``law`` and add up to ``k``; none exceeds 1, the excess goes to the rest."""
    weights = (torch.arange(1, d_sae + 1, dtype=torch.float64) + law.q) ** -law.s
    out, full = torch.ones_like(weights), 0
    while full < d_sae:
        out[full:] = weights[full:] * ((k - full) / weights[full:].sum())
        over = int((out[full:] > 1).sum())
        if not over:
            break
        full += over
        out[:full] = 1.0
    return out


def by_rank(density: Float[Tensor, " d_sae"], values: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Give the r-th of ``values`` to the latent with the r-th largest density; ties go to the lowest latent."""
    order = density.sort(descending=True, stable=True).indices
    values = values.to(density.device, widest_float(density.device))
    return torch.empty_like(values).scatter_(0, order, values)


def budgets(rates: Float[Tensor, " d_sae"], n: int, k: int | float, turn: int) -> Int[Tensor, " d_sae"]:
    """Tokens per latent in a batch of ``n``: ``rates * n`` rounded up or down, adding up to exactly ``int(k * n)``.

    Latents whose share is not a whole number take turns: over successive ``turn`` the mean of a latent's budget is its
    share. So latents with less than one token per batch are served, too. No budget exceeds ``n``: what a share has
    beyond it (where ``k`` is more than the rates add up to) goes to the latents with the highest rates below it.
    """
    order = rates.sort(descending=True, stable=True).indices
    total = int(k * n)
    upto = (in_float64(rates[order]) * n).cumsum(0)
    # On a grid, so that rounding cannot push a whole number across an integer: the start lies between grid points.
    upto = (upto * (total / upto[-1]) * GRID).round()
    # One random number would do for all latents (systematic sampling); multiples of the golden ratio are more even.
    start = math.floor(turn * 0.6180339887498949 % 1.0 * GRID) + 0.5
    steps = ((upto + start) / GRID).floor().long()
    counts = torch.cat([steps[:1], steps.diff()]).clamp_max(n).to(order.device)
    lost, room = total - counts.sum(), n - counts
    counts += (lost - (room.cumsum(0) - room)).clamp_min(0).minimum(room)
    return torch.empty_like(counts).scatter_(0, order, counts)

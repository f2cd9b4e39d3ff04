"""Two-sidedness: do the two signs of a latent mean two things, and are they opposite?

A signed latent is compared with what an unsigned SAE can offer for the same purpose: a pair of latents whose directions
are nearly opposite. Three questions: how many latents use both poles; do the poles fire in different contexts, more
different than a random split; and are their effects on logits opposite (for the poles of one latent this is exact under
the linear readout, for a pair it is measured).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.data.cache.reader import Split
from saelab.errors import UserError
from saelab.metrics.dictionary import living_rows
from saelab.metrics.intervals import Estimate, bootstrap, proportion
from saelab.sae import SAE

MINORITY = 0.1  # of a latent's firings: the rarer pole must reach it for the latent to count as two-sided
MIN_FIRINGS = 20  # of each pole, to compare its contexts
OPPOSITE = -0.7  # cosine below which two unsigned latents count as the poles of one axis


@dataclass(frozen=True)
class Firings:
    """All firings of an SAE on a cache: which latent, its value, and the token under it."""

    latents: Int[Tensor, " m"]
    values: Float[Tensor, " m"]
    tokens: Int[Tensor, " m"]
    n: int
    d_sae: int


@torch.no_grad()
def collect(
    sae: SAE, cache: ActivationCache, max_tokens: int = 100_000, split: Split = "all", batch_size: int = 4096
) -> Firings:
    """Encode up to ``max_tokens`` rows in corpus order and keep every non-zero entry."""
    parts, done = [], 0
    for batch in cache.head(max_tokens, batch_size, split=split):
        code = sae.features(sae.encode(batch.acts.to(sae.device))).nonzero().to("cpu")
        parts.append((code.indices, code.values, batch.tokens[code.rows()]))
        done += code.n
    return Firings(*(torch.cat(column) for column in zip(*parts)), n=done, d_sae=sae.n_features)


def pole_counts(firings: Firings) -> tuple[Int[Tensor, " d_sae"], Int[Tensor, " d_sae"]]:
    """Firings of the positive and of the negative pole of each latent."""
    up = torch.bincount(firings.latents[firings.values > 0], minlength=firings.d_sae)
    return up, torch.bincount(firings.latents[firings.values < 0], minlength=firings.d_sae)


def jensen_shannon(a: Int[Tensor, " m"], b: Int[Tensor, " k"]) -> float:
    """Jensen-Shannon divergence, in bits, of the token distributions of two samples: 0 alike, 1 disjoint."""
    tokens, where = torch.cat([a, b]).unique(return_inverse=True)
    p = torch.bincount(where[: a.numel()], minlength=tokens.numel()).double() / a.numel()
    q = torch.bincount(where[a.numel() :], minlength=tokens.numel()).double() / b.numel()
    m = (p + q) / 2
    divergence = torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)
    return float(divergence.sum() / 2 / np.log(2))


def separation(a: Tensor, b: Tensor, rng: np.random.Generator) -> float:
    """How much more two sets of contexts differ than two random sets of the same sizes drawn from their union.

    The divergence of finite samples is never zero; the random split measures how far from zero chance alone lies.
    """
    union = torch.cat([a, b])
    shuffled = union[torch.from_numpy(rng.permutation(union.numel()))]
    return jensen_shannon(a, b) - jensen_shannon(shuffled[: a.numel()], shuffled[a.numel() :])


def opposite_pairs(W_dec: Float[Tensor, "d_sae d_in"], cosine: float = OPPOSITE) -> list[tuple[int, int]]:
    """Pairs of latents, each in at most one, whose directions have the lowest cosines below ``cosine``."""
    alive = (W_dec.detach().norm(dim=1) > 0).nonzero().flatten()
    W = living_rows(W_dec)
    low, partner = (W @ W.T).min(dim=1)
    pairs, taken = [], set()
    for i in low.argsort().tolist():
        j = int(partner[i])
        if low[i] >= cosine:
            break
        if i not in taken and j not in taken:
            taken |= {i, j}
            pairs.append((int(alive[i]), int(alive[j])))
    return pairs


def two_sidedness(
    sae: SAE,
    firings: Firings,
    seed: int = 0,
    max_axes: int = 500,
    readout: Float[Tensor, "d_in vocab"] | None = None,
) -> dict[str, Estimate]:
    """The share of living latents that are two-sided, and the separation of their two poles.

    For an unsigned SAE an axis is a pair from :func:`opposite_pairs`, and the share is that of latents in a pair. The
    number of axes is reported with the rest; without any there is no separation. With the ``readout``, what turns a
    direction into logits, ``pole_logit_cosine`` says how opposite the two poles' effects on logits are.
    """
    up, down = pole_counts(firings)
    alive = int(((up + down) > 0).sum())
    if alive == 0:
        raise UserError("no latent fires on these tokens; evaluate on more of them")
    if bool((down > 0).any()):
        used = (torch.minimum(up, down) >= MINORITY * (up + down)) & (torch.minimum(up, down) > 0)
        axes = [((j, 1), (j, -1)) for j in used.nonzero().flatten().tolist()]
        count = len(axes)
        what = f"share of living latents whose rarer pole makes at least {MINORITY:.0%} of their firings"
    else:
        pairs = [(i, j) for i, j in opposite_pairs(sae.directions) if up[i] and up[j]]
        axes = [((i, 1), (j, 1)) for i, j in pairs]
        count = 2 * len(axes)
        what = f"share of living latents in a pair of directions with cosine below {OPPOSITE}"
    result = {
        "two_sided_fraction": proportion(count, alive, "latent", what),
        "two_sided_axes": Estimate(float(len(axes)), None, None, firings.n, "token", "number of axes", "none: a count"),
    }
    rng = np.random.default_rng(seed)
    values = []
    for a, b in axes:
        sides = [_tokens(firings, *pole) for pole in (a, b)]
        if min(side.numel() for side in sides) >= MIN_FIRINGS:
            values.append(separation(sides[0], sides[1], rng))
        if len(values) == max_axes:
            break
    if len(values) >= 2:
        sample = np.array(values)
        low, high = bootstrap(sample, np.mean)
        result["pole_separation"] = Estimate(
            *(float(sample.mean()), low, high, len(values), "axis"),
            formula="mean over axes of the Jensen-Shannon divergence (bits) between the tokens under the two poles,"
            " less that of a random split",
            interval=f"95 % bootstrap over {len(values)} axes",
        )
    if readout is not None and axes:
        result["pole_logit_cosine"] = _logit_cosine(sae.W_dec.detach(), readout, axes[:max_axes])
    return result


def _logit_cosine(W_dec: Tensor, readout: Tensor, axes: list[tuple[tuple[int, int], tuple[int, int]]]) -> Estimate:
    values = np.array([logit_effects(sign * W_dec[i], other * W_dec[j], readout) for (i, sign), (j, other) in axes])
    low, high = bootstrap(values, np.mean) if len(values) > 1 else (None, None)
    return Estimate(
        *(float(values.mean()), low, high, len(values), "axis"),
        formula="mean over axes of the cosine of the two poles' effects on the centred logits of the linear readout: -1"
        " is opposite (by construction for the poles of one latent)",
        interval=f"95 % bootstrap over {len(values)} axes" if len(values) > 1 else "none: one axis",
    )


def _tokens(firings: Firings, latent: int, sign: int) -> Tensor:
    mask = (firings.latents == latent) & (firings.values * sign > 0)
    return firings.tokens[mask]


@torch.no_grad()
def logit_effects(a: Float[Tensor, " d_in"], b: Float[Tensor, " d_in"], readout: Float[Tensor, "d_in vocab"]) -> float:
    """Cosine of two directions' effects on the centred logits of the linear readout: -1 is opposite."""
    effects = [direction.to(readout.device) @ readout for direction in (a, b)]
    effects = [effect - effect.mean() for effect in effects]
    return float(torch.cosine_similarity(effects[0], effects[1], dim=0))

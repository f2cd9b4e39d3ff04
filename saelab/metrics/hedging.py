"""Feature hedging: what the latents of a narrow SAE hold of the features that only a wider one has latents for.

Chanin, Dulka and Garriga-Alonso (2025, arXiv 2505.11756): an SAE too narrow for all features mixes those it has no
latent for into latents of features that they are correlated with. Given latents for them, the others change along them.
The paper adds latents to an SAE and trains again; here the latents of two trained widths are matched, which needs no
special training. The rate is the paper's: the change of a latent projected onto the subspace of new latents, as a
share of its norm, corrected by what a random subspace of the same dimension takes: ``(p - b) / (1 - b)``, and at least
0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.metrics.dictionary import living_rows, match_directions

SAME = 0.5  # cosine above which a latent of each width count as the same
DRAWS = 20  # random choices of new latents, and as many random subspaces


class Hedging(NamedTuple):
    """How much of a narrow dictionary's latents lies along the latents that a wider one adds."""

    rate: float
    projected: float  # p: mean |P_new (wide - narrow)|, directions at unit norm
    baseline: float  # b: the same for random subspaces
    baseline_sd: float
    matched: int  # latents of the narrow dictionary that the wide one has
    new: int  # latents of the wide one that span the subspace, drawn from those without a partner


@torch.no_grad()
def hedging(
    narrow: Float[Tensor, "m d_in"], wide: Float[Tensor, "n d_in"], signed: bool = False, seed: int = 0
) -> Hedging:
    """The hedging of a dictionary of ``m`` directions, seen by one of ``n`` that was trained on the same data.

    The subspace has a quarter of ``d_in`` dimensions at most, because one as large as the space takes every change.
    UserError where the wider dictionary adds nothing, or no two latents are the same.
    """
    a, b = living_rows(narrow).float(), living_rows(wide).float()
    if len(b) <= len(a):
        raise UserError(f"hedging compares a narrow SAE with a wider one; these have {len(a)} and {len(b)} latents")
    rows, columns, cosines = match_directions(a, b, signed)
    same = (cosines.abs() if signed else cosines) > SAME
    if not bool(same.any()):
        raise UserError(f"no latent of the narrow SAE is in the wide one (cosine above {SAME}): nothing can be said")
    change = b[columns[same]] * cosines[same].sign()[:, None].float() - a[rows[same]]
    others = torch.ones(len(b), dtype=torch.bool)
    others[columns[same]] = False
    pool = b[others]
    size = min(len(pool), max(1, a.shape[1] // 4))
    generator = torch.Generator().manual_seed(seed)
    found, chance = [], []
    for _ in range(DRAWS):
        chosen = pool[torch.randperm(len(pool), generator=generator)[:size]]
        found.append(_projected(change, chosen))
        chance.append(_projected(change, torch.randn(size, a.shape[1], generator=generator)))
    p, base = float(np.mean(found)), float(np.mean(chance))
    rate = max(0.0, (p - base) / (1 - base)) if base < 1 else 0.0
    return Hedging(rate, p, base, float(np.std(chance, ddof=1)), int(same.sum()), size)


def _projected(change: Float[Tensor, "k d_in"], directions: Float[Tensor, "size d_in"]) -> float:
    """Mean norm of the changes after projection onto the span of ``directions``."""
    _, values, basis = torch.linalg.svd(directions, full_matrices=False)
    basis = basis[values > 1e-6 * values.max()]
    return float((change @ basis.T).norm(dim=1).mean())

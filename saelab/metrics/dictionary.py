"""The geometry of a dictionary ``W_dec [d_sae, d_in]``: coherence, Babel function, rank, stability between seeds.

Directions are compared at unit norm; rows of norm zero are left out. Sources: Tropp (2004) for the Babel function;
Costa et al. (2025) for its use on co-selected sets and for the effective rank of the code.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.devices import in_float64
from saelab.errors import UserError
from saelab.sparse import SparseCode


def living_rows(W: Float[Tensor, "m d_in"]) -> Float[Tensor, "alive d_in"]:
    """The rows that are not zero, at unit norm, in float64."""
    W = in_float64(W.detach())
    norms = W.norm(dim=1)
    return W[norms > 0] / norms[norms > 0, None]


def _blocks(W: Tensor, rows: int = 1024) -> list[Tensor]:
    return [torch.arange(start, min(start + rows, W.shape[0])) for start in range(0, W.shape[0], rows)]


def max_cosines(W_dec: Float[Tensor, "m d_in"], signed: bool = False) -> Float[Tensor, " m"]:
    """For each direction the largest cosine (magnitude when ``signed``) to another one."""
    W = living_rows(W_dec)
    if W.shape[0] < 2:
        raise UserError("coherence compares directions, and the dictionary has fewer than two that are not zero")
    out = W.new_empty(W.shape[0])
    for block in _blocks(W):
        cosines = W[block] @ W.T
        cosines = cosines.abs() if signed else cosines
        cosines[torch.arange(block.numel()), block] = -2
        out[block] = cosines.amax(dim=1)
    return out


def coherence_histogram(W_dec: Float[Tensor, "m d_in"], bins: int = 100) -> tuple[list[float], list[int]]:
    """Edges in -1 .. 1 and counts of all off-diagonal cosines, each pair twice."""
    W = living_rows(W_dec)
    counts = torch.zeros(bins, dtype=torch.float64)
    for block in _blocks(W):
        cosines = (W[block] @ W.T).clamp(-1, 1)
        keep = torch.ones_like(cosines, dtype=torch.bool)
        keep[torch.arange(block.numel()), block] = False
        counts += torch.histc(cosines[keep], bins, -1, 1)
    return torch.linspace(-1, 1, bins + 1).tolist(), counts.long().tolist()


def babel(W_dec: Float[Tensor, "m d_in"], r_max: int) -> Float[Tensor, " r_max"]:
    """Babel function ``mu_1(r) = max_j`` of the sum of the r largest ``|cos(d_i, d_j)|``, i != j, for r = 1 .. r_max.

    Exact: the worst set for a fixed j consists of its r nearest directions, of either sign.
    """
    W = living_rows(W_dec)
    if not 1 <= r_max < W.shape[0]:
        raise UserError(f"the Babel function of {W.shape[0]} directions is defined for r up to {W.shape[0] - 1}")
    best = W.new_zeros(r_max)
    for block in _blocks(W):
        cosines = (W[block] @ W.T).abs()
        cosines[torch.arange(block.numel()), block] = -1
        best = torch.maximum(best, cosines.topk(r_max, dim=1).values.cumsum(dim=1).amax(dim=0))
    return best


def babel_co_selected(W_dec: Float[Tensor, "d_sae d_in"], code: SparseCode, r_max: int) -> Float[Tensor, " r_max"]:
    """The Babel function restricted to the latents each token uses together, averaged over tokens.

    A token with fewer than r + 1 active latents counts with its value at the largest r it has; tokens with fewer
    than two are left out.
    """
    code = code.nonzero()
    norms = W_dec.detach().norm(dim=1, keepdim=True)
    W = W_dec.detach() / norms.where(norms > 0, 1.0)
    total, n = torch.zeros(r_max, dtype=torch.float64), 0
    for start, stop in zip(code.row_ptr[:-1].tolist(), code.row_ptr[1:].tolist()):
        size = stop - start
        if size < 2:
            continue
        chosen = W[code.indices[start:stop]]
        cosines = (chosen @ chosen.T).abs().fill_diagonal_(-1)
        curve = cosines.topk(min(r_max, size - 1), dim=1).values.cumsum(dim=1).amax(dim=0)
        curve = in_float64(curve)
        total += torch.cat([curve, curve[-1:].expand(r_max - curve.numel())])
        n += 1
    if n == 0:
        raise UserError("no token uses two latents together, so there is no co-selected set to measure")
    return total / n


def effective_rank(code: SparseCode) -> float:
    """``exp`` of the entropy of the eigenvalues of ``Z^T Z``, normalised to sum 1, over the latents in use."""
    used, compact = code.indices.unique(return_inverse=True)
    values = in_float64(code.values.detach())
    z = torch.zeros(code.n, used.numel(), dtype=torch.float64).index_put((code.rows(), compact), values)
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
    if not eigenvalues.sum() > 0:
        raise UserError("the code is zero everywhere, so it has no rank; evaluate an SAE that fires")
    share = eigenvalues / eigenvalues.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def match_directions(A: Tensor, B: Tensor, signed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """One-to-one matching of the rows of ``A`` to those of ``B`` with the largest sum of cosines (Hungarian).

    Returns the matched rows of A, of B, and their cosines; ``signed`` matches by magnitude, because a latent with two
    poles may have learned the opposite direction. Rows must not be zero.
    """
    from scipy.optimize import linear_sum_assignment

    wide = (in_float64(W.detach()) for W in (A, B))
    unit_a, unit_b = (W / W.norm(dim=1, keepdim=True) for W in wide)
    cosines = unit_a @ unit_b.T
    rows, columns = linear_sum_assignment((cosines.abs() if signed else cosines).numpy(), maximize=True)
    rows, columns = torch.from_numpy(rows), torch.from_numpy(columns)
    return rows, columns, cosines[rows, columns]


def shared_fraction(
    A: Float[Tensor, "m d_in"], B: Float[Tensor, "n d_in"], threshold: float = 0.7, signed: bool = False
) -> tuple[float, float]:
    """Share of the smaller dictionary's directions that can be matched one to one at a cosine above ``threshold``, and
    what directions at random in place of ``B`` give: two seeds of one SAE that agree no better share nothing.

    The number of pairs is the largest possible. The measure, for SAEs of different seeds, is that of Paulo and Belrose
    (2025).
    """
    generator = torch.Generator().manual_seed(0)
    a, b = living_rows(A), living_rows(B)
    random = living_rows(torch.randn(b.shape, generator=generator, dtype=torch.float64))
    least = max(1, min(len(a), len(b)))
    found, chance = (float(_matched(a, other, threshold, signed).sum()) / least for other in (b, random))
    return found, chance


def shared_rows(
    A: Float[Tensor, "m d_in"], B: Float[Tensor, "n d_in"], threshold: float = 0.7, signed: bool = False
) -> Bool[Tensor, " m"]:
    """Which directions of ``A`` are in the largest one-to-one matching with those of ``B`` at a cosine above
    ``threshold``; rows that are zero are in none."""
    alive = A.detach().norm(dim=1).cpu() > 0
    found = torch.zeros(len(A), dtype=torch.bool)
    found[alive] = _matched(living_rows(A), living_rows(B), threshold, signed)
    return found


def _matched(a: Tensor, b: Tensor, threshold: float, signed: bool) -> Bool[Tensor, " m"]:
    from scipy import sparse
    from scipy.sparse.csgraph import maximum_bipartite_matching

    rows, columns = [], []
    for block in _blocks(a):
        cosines = a[block].float() @ b.float().T
        found = ((cosines.abs() if signed else cosines) > threshold).nonzero()
        rows.append(block[found[:, 0]])
        columns.append(found[:, 1])
    row, column = torch.cat(rows).numpy(), torch.cat(columns).numpy()
    edges = sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(len(a), len(b)))
    return torch.from_numpy(maximum_bipartite_matching(edges, perm_type="column") >= 0)


def stability(A: Float[Tensor, "m d_in"], B: Float[Tensor, "m d_in"], signed: bool = False) -> float:
    """Mean matched cosine between two dictionaries trained with different seeds: 1 is the same dictionary."""
    matched = match_directions(A, B, signed)[2]
    return float((matched.abs() if signed else matched).mean())

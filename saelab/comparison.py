"""Match the latents of two SAEs: which are shared, which are split or absorbed, and which only one of them has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import SAE
from saelab.sae.base import unit_rows


@dataclass(frozen=True)
class LatentMatching:
    """``pairs``: left, right, cosine, correlation, similarity of each matched pair, most similar first.

    ``left`` and ``right`` have one row per latent of either SAE: latent, status, partner (its match, or -1), best (its
    closest latent on the other side by cosine), cosine (with ``best``), related (latents it is split into or absorbed
    by). ``tokens`` says on how many tokens activations were compared; 0 when only decoders were.
    """

    pairs: pd.DataFrame
    left: pd.DataFrame
    right: pd.DataFrame
    tokens: int

    def counts(self) -> dict[str, dict[str, int]]:
        """Latents of each status on either side."""
        return {
            side: {str(k): int(v) for k, v in getattr(self, side)["status"].value_counts().items()}
            for side in ("left", "right")
        }


def _quiet(done: float, what: str) -> None:
    """Nobody is told."""


@torch.no_grad()
def match_saes(
    left: SAE,
    right: SAE,
    cache: ActivationCache | None = None,
    *,
    tokens: int = 65_536,
    shared: float = 0.7,
    related: float = 0.3,
    contained: float = 0.5,
    candidates: int = 32,
    progress: Callable[[float, str], object] = _quiet,
) -> LatentMatching:
    """Match latents one to one so that the total similarity is the largest possible.

    Similarity is the cosine of the decoder rows, averaged with the Pearson correlation of the activations over the
    first ``tokens`` rows of ``cache`` where one is given. For signed SAEs a latent also matches one that is its exact
    mirror image (absolute cosine, correlation times the cosine's sign). Only pairs with a similarity of at least
    ``shared`` are matched, and only each latent's ``candidates`` closest on the other side (by cosine, ``related`` or
    more) are looked at; among those the assignment is optimal.

    Status of a latent: *shared* if matched. Otherwise, over the other side's latents with a cosine of at least
    ``related``: *split* if two or more of them fire mostly (``contained``) where it fires and together cover as much
    of its firings; *absorbed* if one of them fires on that share of its firings; *only* else; *dead* if it never fires
    on the tokens compared. Without a cache, *split* means two or more related latents at a cosine of ``contained`` and
    *absorbed* one of them.

    ``progress`` is called with the share that is done and what is being done.
    """
    if left.d_in != right.d_in:
        raise UserError(f"the SAEs read d_in={left.d_in} and d_in={right.d_in}; only SAEs of one hook can be matched")
    if left.transcodes != right.transcodes or left.d_out != right.d_out:
        raise UserError("a transcoder's latents are matched with those of another transcoder onto the same target only")
    signed = left.signed or right.signed
    cosines = _near_pairs(left, right, candidates, related, signed, progress)
    progress(0.5, "Encoding tokens")
    codes: Any = None if cache is None else [_codes(sae, cache, tokens) for sae in (left, right)]
    progress(0.6, "Correlating activations")
    table: Any = _similarities(cosines, codes, signed)
    progress(0.8, "Assigning pairs")
    pairs = _assign(table[table["similarity"] >= shared], left.n_features, right.n_features)
    n = 0 if codes is None else codes[0].shape[0]
    back = None if codes is None else codes[::-1]
    swapped = table.rename(columns={"left": "right", "right": "left"})
    turned = pairs.rename(columns={"left": "right", "right": "left"})
    return LatentMatching(
        pairs,
        _statuses(table, pairs, codes, left.n_features, contained, "only-left"),
        _statuses(swapped, turned, back, right.n_features, contained, "only-right"),
        n,
    )


def matching_poles(cosines: ArrayLike, signed: tuple[bool, bool]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The poles (1 or -1) that point the same way in latents of a left and a right SAE with these cosines.

    Where both SAEs are ``signed`` the left pole is the positive one; an SAE that is not has no other.
    """
    turned = np.where(np.asarray(cosines, dtype=float) < 0, -1, 1)
    plus = np.ones_like(turned)
    left, right = signed
    return (turned if left and not right else plus), (turned if right else plus)


def _near_pairs(
    left: SAE, right: SAE, k: int, floor: float, signed: bool, progress: Callable[[float, str], object]
) -> pd.DataFrame:
    """The ``k`` closest pairs from either side with a cosine of at least ``floor``."""
    a, b = (unit_rows(sae.directions.detach().float().cpu()) for sae in (left, right))
    found = []
    for first, second, flip in ((a, b, False), (b, a, True)):
        for rows in torch.arange(len(first)).split(1024):
            progress(0.25 * flip + 0.25 * int(rows[0]) / len(first), "Comparing decoder rows")
            cosine = first[rows] @ second.T
            key = cosine.abs() if signed else cosine
            best = key.topk(min(k, len(second)), dim=1)
            own = rows[:, None].expand_as(best.indices)
            keep = best.values >= floor
            ends = (own[keep], best.indices[keep])
            found.append(torch.stack([*(ends[::-1] if flip else ends), cosine.gather(1, best.indices)[keep].double()]))
    columns = torch.cat(found, dim=1).numpy()
    table = pd.DataFrame({"left": columns[0].astype(int), "right": columns[1].astype(int), "cosine": columns[2]})
    return table.drop_duplicates(["left", "right"], ignore_index=True)


def _codes(sae: SAE, cache: ActivationCache, tokens: int) -> sparse.csr_matrix:
    """Activations by token and latent."""
    parts = []
    with sae.evaluating():
        for batch in cache.head(tokens):
            code = sae.features(sae.encode(batch.acts.to(sae.device))).nonzero().to("cpu")
            values, indices, ptr = code.values.double().numpy(), code.indices.numpy(), code.row_ptr.numpy()
            parts.append(sparse.csr_matrix((values, indices, ptr), shape=(code.n, sae.n_features)))
    return sparse.csr_matrix(sparse.vstack(parts))


def _similarities(table: pd.DataFrame, codes: list[sparse.csr_matrix] | None, signed: bool) -> pd.DataFrame:
    """Add correlation and similarity to candidate pairs."""
    cosine = table["cosine"].to_numpy()
    size = np.abs(cosine) if signed else cosine
    if codes is None:
        return table.assign(correlation=np.nan, similarity=size)
    left, right = (sparse.csc_matrix(code) for code in codes)
    n = len(codes[0].indptr) - 1
    i, j = table["left"].to_numpy(), table["right"].to_numpy()
    product = np.array([_column_dot(left, right, a, b) for a, b in zip(i, j)])
    moments = [_moments(code) for code in (left, right)]
    covariance = product / n - moments[0][0][i] * moments[1][0][j]
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = covariance / (moments[0][1][i] * moments[1][1][j])
    known = np.nan_to_num(correlation)
    flip = np.sign(cosine) if signed else 1.0
    return table.assign(correlation=correlation, similarity=(size + known * flip) / 2)


def _column_dot(a: sparse.csc_matrix, b: sparse.csc_matrix, i: int, j: int) -> float:
    x, y = slice(a.indptr[i], a.indptr[i + 1]), slice(b.indptr[j], b.indptr[j + 1])
    _, here, there = np.intersect1d(a.indices[x], b.indices[y], assume_unique=True, return_indices=True)
    return float(a.data[x][here] @ b.data[y][there])


def _moments(code: sparse.csc_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each column, zeros included."""
    mean = np.asarray(code.mean(0)).ravel()
    square = np.asarray(code.multiply(code).mean(0)).ravel()
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _assign(table: Any, n_left: int, n_right: int) -> pd.DataFrame:
    """One-to-one pairs of the largest total similarity; leaving a latent out adds nothing."""
    columns = ["left", "right", "cosine", "correlation", "similarity"]
    if table.empty:
        return table[columns]
    i, j, gain = (table[name].to_numpy() for name in ("left", "right", "similarity"))
    # Each left latent may also take an extra column of its own, with no gain, so a full matching always exists. Weights
    # are shifted by one because the solver reads a stored zero as no edge.
    rows = np.concatenate([i, np.arange(n_left)])
    cols = np.concatenate([j, n_right + np.arange(n_left)])
    weight = np.concatenate([1.0 + gain, np.ones(n_left)])
    graph = sparse.csr_matrix((weight, (rows, cols)), shape=(n_left, n_right + n_left))
    own, other = min_weight_full_bipartite_matching(graph, maximize=True)
    chosen = set(zip(own.tolist(), other.tolist()))
    keep = [pair in chosen for pair in zip(i.tolist(), j.tolist())]
    return table[keep][columns].sort_values(by="similarity", ascending=False).reset_index(drop=True)


def _statuses(
    table: Any,
    pairs: Any,
    codes: list[sparse.csr_matrix] | None,
    n: int,
    contained: float,
    alone: str,
) -> pd.DataFrame:
    """Status of each latent of the side called ``left`` in ``table`` and ``pairs``."""
    partner = np.full(n, -1)
    partner[pairs["left"]] = pairs["right"]
    status = np.where(partner >= 0, "shared", alone).astype(object)
    related: list[list[int]] = [[] for _ in range(n)]
    best, cosine = np.full(n, -1), np.full(n, np.nan)
    fires = None if codes is None else [sparse.csc_matrix(code) for code in codes]
    for latent, group in table.groupby("left"):
        row = group.loc[group["cosine"].abs().idxmax()]
        best[latent], cosine[latent] = row["right"], row["cosine"]
        if partner[latent] >= 0:
            continue
        if fires is None:
            related[latent] = group["right"][group["cosine"].abs() >= contained].tolist()
            parts = related[latent]
            status[latent] = "split" if len(parts) > 1 else "absorbed" if parts else alone
        else:
            status[latent], related[latent] = _explain(fires, int(latent), group["right"].tolist(), contained, alone)
    if codes is not None:
        silent = np.diff(sparse.csc_matrix(codes[0]).indptr) == 0
        status[silent & (partner < 0)] = "dead"
    return pd.DataFrame(
        {
            "latent": np.arange(n),
            "status": status,
            "partner": partner,
            "best": best,
            "cosine": cosine,
            "related": related,
        }
    )


def _explain(
    fires: list[sparse.csc_matrix], latent: int, others: list[int], contained: float, alone: str
) -> tuple[str, list[int]]:
    """Whether an unmatched latent's firings are split among, or absorbed by, latents of the other side."""
    own = _rows(fires[0], latent)
    if not len(own):
        return alone, []
    shared = {other: np.intersect1d(own, _rows(fires[1], other)) for other in others}
    parts = [o for o, both in shared.items() if len(both) and len(both) >= contained * len(_rows(fires[1], o))]
    covered = np.unique(np.concatenate([shared[o] for o in parts])) if parts else own[:0]
    if len(parts) > 1 and len(covered) >= contained * len(own):
        return "split", parts
    takers = [o for o, both in shared.items() if len(both) >= contained * len(own)]
    return ("absorbed", takers) if takers else (alone, [])


def _rows(fires: sparse.csc_matrix, column: int) -> NDArray:
    return np.asarray(fires.indices)[fires.indptr[column] : fires.indptr[column + 1]]

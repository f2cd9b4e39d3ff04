"""Numbers about each (latent, pole) from its complete list of firings."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saelab.features.corpus import Corpus
from saelab.features.postings import Entries
from saelab.features.schema import QUANTILES


class Ranked(NamedTuple):
    """Firings of each slot from the largest magnitude down (ties: lower row first), as indices into the entries."""

    order: NDArray[np.int64]
    ptr: NDArray[np.int64]


def rank(entries: Entries, slots: NDArray[np.int64]) -> Ranked:
    """Order every slot's firings by magnitude, descending."""
    # Bits of a positive float order like the float itself, so slot and magnitude pack into one sortable integer.
    bits = np.abs(entries.values).view(np.uint32).astype(np.int64)
    return Ranked(np.argsort((slots << 32) | (0xFFFFFFFF - bits), kind="stable"), entries.ptr)


def histogram_edges(low: float, high: float, bins: int) -> NDArray[np.float64]:
    """Logarithmic bin edges from ``low`` to ``high``, over at most five decades; smaller values join the first bin."""
    low = max(low, high * 1e-5)
    return np.geomspace(low, high, bins + 1) if high > low else np.linspace(low * 0.5, high * 1.5, bins + 1)


def magnitude_statistics(
    entries: Entries, slots: NDArray[np.int64], ranked: Ranked, n_rows: int, edges: NDArray[np.float64]
) -> dict[str, Any]:
    """count, density, max, mean, quantiles and histogram of each slot."""
    size = np.abs(entries.values)
    count = np.diff(entries.ptr)
    n = len(count)
    fires = count > 0
    columns: dict[str, Any] = {"count": count, "density": count / n_rows}
    best = np.zeros(n, np.float32)
    best[fires] = size[ranked.order[entries.ptr[:-1][fires]]]
    columns["max"] = best
    columns["mean"] = np.bincount(slots, size, n) / np.maximum(count, 1)
    descending = size[ranked.order]
    for name, q in QUANTILES.items():
        columns[name] = _quantile(descending, entries.ptr, q)
    bins = np.searchsorted(edges[1:-1], size, side="right")
    flat = np.bincount(slots * (len(edges) - 1) + bins, minlength=n * (len(edges) - 1))
    columns["histogram"] = list(flat.reshape(n, -1))
    return columns


def _quantile(descending: NDArray[np.float32], ptr: NDArray[np.int64], q: float) -> NDArray[np.float32]:
    """Linear-interpolated quantile of each segment of segment-wise descending values; 0 for an empty one."""
    count = np.diff(ptr)
    out = np.zeros(len(count), np.float32)
    fires = count > 0
    at = (1 - q) * (count[fires] - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, count[fires] - 1)
    start = ptr[:-1][fires]
    a, b = descending[start + low].astype(np.float64), descending[start + high].astype(np.float64)
    out[fires] = a + (at - low) * (b - a)
    return out


class TokenCounts(NamedTuple):
    """Distinct (slot, token) pairs in ascending order with their number of firings."""

    slots: NDArray[np.int64]
    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]


def count_tokens(slots: NDArray[np.int64], tokens: NDArray[np.integer], vocab: int) -> TokenCounts:
    """How often each slot meets each token."""
    keys = np.sort(slots * vocab + tokens)
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    pairs = keys[first]
    return TokenCounts(pairs // vocab, pairs % vocab, np.diff(np.append(first, len(keys))))


def token_statistics(pairs: TokenCounts, n_slots: int, top: int) -> dict[str, Any]:
    """Entropy of the tokens a slot fires on, and the most frequent of them (ids)."""
    total = np.bincount(pairs.slots, pairs.counts, n_slots)
    logs = np.bincount(pairs.slots, pairs.counts * np.log2(pairs.counts), n_slots)
    safe = np.maximum(total, 1)
    best = group_top(pairs.slots, pairs.counts, n_slots, top)
    share = np.array([pairs.counts[b[0]] / safe[s] if len(b) else 0.0 for s, b in enumerate(best)])
    return {
        "token_entropy": np.where(total > 0, np.maximum(np.log2(safe) - logs / safe, 0.0), 0.0),
        "token_share": share,
        "top_tokens": [pairs.tokens[b] for b in best],
        "top_token_counts": [pairs.counts[b] for b in best],
    }


def group_top(groups: NDArray[np.int64], scores: NDArray, n_groups: int, top: int) -> list[NDArray[np.int64]]:
    """For each group the indices of its ``top`` highest scores, best first (ties: first come)."""
    order = np.lexsort((np.arange(len(groups)), -scores, groups))
    ptr = np.searchsorted(groups[order], np.arange(n_groups + 1))
    return [order[a : min(a + top, b)] for a, b in itertools.pairwise(ptr)]


class Covariates:
    """Properties of every row that an activation is correlated with."""

    names = ("position_corr", "frequency_corr", "first_corr", "norm_corr")

    def __init__(self, corpus: Corpus, n_rows: int) -> None:
        rows = np.arange(n_rows)
        tokens = corpus.tokens(rows)
        frequency = np.bincount(tokens)
        contexts = corpus.contexts(rows)
        self.values = np.stack(
            [
                corpus.positions[corpus.place_of[:n_rows]].astype(np.float32),
                np.log(frequency[tokens]).astype(np.float32),
                (np.diff(contexts, prepend=-1) != 0).astype(np.float32),
                np.asarray(corpus.norms[:n_rows]),
            ]
        )
        self.mean = self.values.mean(1, dtype=np.float64)
        self.std = self.values.std(1, dtype=np.float64)

    def correlate(self, entries: Entries, slots: NDArray[np.int64]) -> dict[str, Any]:
        """Pearson correlation of each slot's magnitude (0 where silent) with each covariate; NaN if one is constant."""
        n, n_rows = len(entries.ptr) - 1, self.values.shape[1]
        size = np.abs(entries.values).astype(np.float64)
        mean = np.bincount(slots, size, n) / n_rows
        std = np.sqrt(np.maximum(np.bincount(slots, size**2, n) / n_rows - mean**2, 0.0))
        out = {}
        for name, row, g_mean, g_std in zip(self.names, self.values, self.mean, self.std):
            # Centring the covariate keeps the sum small; the mean of the magnitude then drops out.
            product = np.bincount(slots, size * (row[entries.rows] - g_mean), n) / n_rows
            with np.errstate(divide="ignore", invalid="ignore"):
                out[name] = np.where((std > 0) & (g_std > 0), product / (std * g_std), np.nan).clip(-1.0, 1.0)
        return out

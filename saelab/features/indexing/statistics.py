"""Numbers about each (latent, pole) from its complete list of firings."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.groups import by_group_descending, group_top, in_order, lists, table_rows
from saelab.features.indexing.postings import Entries
from saelab.features.schema import QUANTILES


class Ranked(NamedTuple):
    """Firings of each slot from the largest magnitude down (ties: lower row first), as indices into the entries."""

    order: NDArray[np.int64]
    ptr: NDArray[np.int64]


def rank(entries: Entries, slots: NDArray[np.int64]) -> Ranked:
    """Order every slot's firings by magnitude, descending."""
    return Ranked(by_group_descending(slots, np.abs(entries.values)), entries.ptr)


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
    columns["histogram"] = table_rows(flat.reshape(n, -1))
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
    keys = in_order(slots * vocab + tokens)[0]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    pairs = keys[first]
    return TokenCounts(pairs // vocab, pairs % vocab, np.diff(np.append(first, len(keys))))


def token_statistics(pairs: TokenCounts, n_slots: int, top: int) -> dict[str, Any]:
    """Entropy of the tokens a slot fires on, and the most frequent of them (ids)."""
    total = np.bincount(pairs.slots, pairs.counts, n_slots)
    logs = np.bincount(pairs.slots, pairs.counts * np.log2(pairs.counts), n_slots)
    safe = np.maximum(total, 1)
    best = group_top(pairs.slots, pairs.counts, top)
    tokens, counts = lists(pairs.slots[best], n_slots, pairs.tokens[best], pairs.counts[best])
    most = np.zeros(n_slots, np.int64)
    np.maximum.at(most, pairs.slots[best], pairs.counts[best])
    return {
        "token_entropy": np.where(total > 0, np.maximum(np.log2(safe) - logs / safe, 0.0), 0.0),
        "token_share": most / safe,
        "top_tokens": tokens,
        "top_token_counts": counts,
    }


class Covariates:
    """Properties of every row that an activation is correlated with."""

    names = ("position_corr", "frequency_corr", "first_corr", "norm_corr")

    def __init__(self, corpus: Corpus) -> None:
        self.n_rows = corpus.n_rows
        frequency = np.zeros(int(corpus.text.max()) + 1, np.int64)
        for rows in corpus.row_pieces():
            frequency += np.bincount(corpus.tokens(rows), minlength=len(frequency))
        self.values = [corpus.array(name, self.n_rows, np.float32) for name in self.names]
        for rows in corpus.row_pieces():
            here = slice(rows[0], rows[-1] + 1)
            before = corpus.contexts(np.maximum(rows - 1, 0))
            first = (corpus.contexts(rows) != before) | (rows == 0)
            columns = corpus.positions[corpus.place_of[rows]], np.log(frequency[corpus.tokens(rows)]), first
            for values, column in zip(self.values, (*columns, corpus.norms[rows])):
                values[here] = column
        self.mean = [values.mean(dtype=np.float64) for values in self.values]
        self.std = [values.std(dtype=np.float64) for values in self.values]

    def correlate(self, entries: Entries, slots: NDArray[np.int64]) -> dict[str, Any]:
        """Pearson correlation of each slot's magnitude (0 where silent) with each covariate; NaN if one is constant."""
        n, n_rows = len(entries.ptr) - 1, self.n_rows
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

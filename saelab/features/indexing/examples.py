"""Choose example tokens for each latent, and cut windows around them with the latent's activation on each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saelab.data.chat import ROLES
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.groups import in_order, rank_in_group, systematic
from saelab.features.indexing.postings import Entries
from saelab.features.indexing.statistics import Ranked
from saelab.features.schema import EXAMPLE_COLUMNS

BANDS = ("q75", "q50", "q25", "q00")  # quarters of the firings, from the largest magnitudes down
KINDS = ("top", *BANDS, "random", "silent", "hard")
HARDEST = 8  # strongest firings whose tokens are looked for elsewhere
DRAWS = 3  # places for each of them
OCCURRENCES = 1 << 21  # rows in which tokens are looked for


@dataclass
class Chosen:
    """Focus tokens: slot (counted from the chunk's first), row, kind (number in KINDS), rank within the kind."""

    slots: NDArray[np.int64]
    rows: NDArray[np.int64]
    kinds: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @classmethod
    def join(cls, parts: list[Chosen]) -> Chosen:
        """All parts, ordered by slot, kind, rank."""
        fields = [np.concatenate([getattr(p, name) for p in parts]) for name in ("slots", "rows", "kinds", "ranks")]
        order = np.lexsort((fields[3], fields[2], fields[0]))
        return cls(*(f[order] for f in fields))


class Occurrences:
    """Rows by token, of a sample of the corpus."""

    def __init__(self, corpus: Corpus) -> None:
        rows = np.arange(0, corpus.n_rows, -(-corpus.n_rows // OCCURRENCES))
        tokens = corpus.counted(rows)
        order = np.argsort(tokens, kind="stable")
        self.rows, self.tokens = rows[order], np.asarray(tokens)[order]

    def draw(self, tokens: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.int64]:
        """A random row of each token, -1 for a token that the sample does not have."""
        low, high = (np.searchsorted(self.tokens, tokens, side) for side in ("left", "right"))
        at = low + (rng.random(len(tokens)) * (high - low)).astype(np.int64)
        return np.where(high > low, self.rows[np.minimum(at, len(self.rows) - 1)], -1)


def choose(
    firings: Firings,
    slots: NDArray[np.int64],
    ranked: Ranked,
    n_poles: int,
    config: IndexConfig,
    rng: np.random.Generator,
    occurrences: Occurrences,
) -> Chosen:
    """Top firings (the best of each context), a sample of each quarter, a sample of all, and silent windows: of random
    tokens, and hard ones, whose focus is the token of a strong firing.

    Samples are systematic with a random start: every firing is equally likely to be taken, none twice.
    """
    entries, corpus = firings.entries, firings.corpus
    n = len(entries.ptr) - 1
    parts = [_top(entries, slots, ranked, corpus, config.top)]
    fired = np.diff(entries.ptr)
    for number, band in enumerate(BANDS):
        begin, end = fired * number // len(BANDS), fired * (number + 1) // len(BANDS)
        s, offset, order = systematic(end - begin, config.band, rng)
        entry = ranked.order[ranked.ptr[s] + begin[s] + offset]
        parts.append(Chosen(s, entries.rows[entry], np.full(len(s), KINDS.index(band)), order))
    s, offset, order = systematic(fired, config.random, rng)
    rows = entries.rows[entries.ptr[s] + offset]
    parts.append(Chosen(s, rows, np.full(len(s), KINDS.index("random")), order))
    # Windows without any firing: draw twice as many as needed, keep the silent ones.
    drawn = np.repeat(np.arange(0, n, 3 - n_poles), 2 * config.silent)
    candidates = rng.integers(0, corpus.n_rows, len(drawn))
    parts.append(_silent(firings, drawn, candidates, config, "silent", config.silent))
    if config.hard:
        strong = ranked.order[rank_in_group(slots[ranked.order]) < HARDEST]
        drawn = np.repeat(slots[strong], DRAWS)
        found = occurrences.draw(np.repeat(corpus.counted(entries.rows[strong]), DRAWS), rng)
        there = found >= 0
        parts.append(_silent(firings, drawn[there], found[there], config, "hard", config.hard))
    return Chosen.join(parts)


def _silent(
    firings: Firings,
    slots: NDArray[np.int64],
    rows: NDArray[np.int64],
    config: IndexConfig,
    kind: str,
    most: int,
) -> Chosen:
    """The first ``most`` different rows of each slot in whose windows its latent does not fire."""
    silent = (firings.windows(slots, rows, config)[0] == 0).all(1)
    keys = slots[silent] * firings.corpus.n_rows + rows[silent]
    first = np.sort(np.unique(keys, return_index=True)[1])
    slots, rows = slots[silent][first], rows[silent][first]
    order = rank_in_group(slots)
    keep = order < most
    return Chosen(slots[keep], rows[keep], np.full(int(keep.sum()), KINDS.index(kind)), order[keep])


def _top(entries: Entries, slots: NDArray, ranked: Ranked, corpus: Corpus, top: int) -> Chosen:
    if not len(slots):
        return Chosen(*(np.empty(0, np.int64) for _ in range(4)))
    context = corpus.contexts(entries.rows)
    # A slot's firings come in row order, so those of one context are neighbours and form a group.
    group = np.cumsum((np.diff(slots, prepend=-1) != 0) | (np.diff(context, prepend=-1) != 0)) - 1
    first = np.full(group[-1] + 1, -1)
    backwards = ranked.order[::-1]
    first[group[backwards]] = backwards  # the last write to a group is its largest magnitude
    is_best = np.zeros(len(slots), bool)
    is_best[first] = True
    order = ranked.order[is_best[ranked.order]]
    place = rank_in_group(slots[order])
    order, place = order[place < top], place[place < top]
    return Chosen(slots[order], entries.rows[order], np.full(len(order), KINDS.index("top")), place)


class Firings(NamedTuple):
    """The entries of a range, found by latent and row in the text that they come from."""

    entries: Entries
    corpus: Corpus
    keys: NDArray[np.int64]  # latent * n_rows + row of each entry, in ascending order
    order: NDArray[np.int64] | None  # the places of these entries; None: they stand in that order

    @classmethod
    def of(cls, entries: Entries, slots: NDArray[np.int64], corpus: Corpus) -> Firings:
        """The entries of a range, whose ``slots`` are given."""
        keys = slots // 2 * corpus.n_rows + entries.rows
        if (keys[1:] < keys[:-1]).any():  # signed: the poles of a latent interleave
            return cls(entries, corpus, *in_order(keys))
        return cls(entries, corpus, keys, None)

    def windows(
        self, slots: NDArray[np.int64], rows: NDArray[np.int64], config: IndexConfig
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
        """Signed activations of each slot's latent (both poles) in the window of each row.

        Returns ``values [n, width]``, ``places [n, width]`` and ``inside [n, width]``.
        """
        corpus, keys = self.corpus, self.keys
        window = corpus.windows(rows, config.before, config.after)
        at = np.where(window.inside, corpus.row_at[window.places], -1)
        wanted = (slots // 2)[:, None] * corpus.n_rows + at
        found = np.searchsorted(keys, wanted.ravel()).reshape(wanted.shape).clip(0, max(len(keys) - 1, 0))
        values = np.zeros(wanted.shape, np.float32)
        if len(keys):
            hit = (keys[found] == wanted) & (at >= 0)
            values[hit] = self.entries.values[found[hit] if self.order is None else self.order[found[hit]]]
        return values, window.places, window.inside


def example_table(
    chosen: Chosen, firings: Firings, first_slot: int, vocabulary: pa.Array, config: IndexConfig
) -> pa.Table:
    """The rows of ``examples.parquet`` for the chosen tokens."""
    values, places, inside = firings.windows(chosen.slots, chosen.rows, config)
    corpus = firings.corpus
    centre = corpus.place_of[chosen.rows]
    focus_value = values[:, config.before]
    offsets = pa.array(np.concatenate([[0], np.cumsum(inside.sum(1))]), pa.int32())
    tokens, shown = pa.array(corpus.text[places[inside]]), pa.array(corpus.shown[places[inside]])
    slots = chosen.slots + first_slot
    columns: dict[str, Any] = {
        "latent": slots // 2,
        "pole": 1 - 2 * (slots % 2),
        "kind": pa.array(KINDS, pa.string()).take(pa.array(chosen.kinds)),
        "rank": chosen.ranks,
        "row": chosen.rows,
        "document": corpus.documents[centre],
        "value": focus_value,
        "tokens": pa.ListArray.from_arrays(offsets, tokens),
        "strings": pa.ListArray.from_arrays(offsets, vocabulary.take(shown)),
        "activations": pa.ListArray.from_arrays(offsets, pa.array(values[inside])),
        "focus": inside[:, : config.before].sum(1),
        "role": pa.array(ROLES, pa.string()).take(pa.array(corpus.roles[centre])),
    }
    arrays = [
        columns[name] if isinstance(columns[name], pa.Array) else pa.array(np.asarray(columns[name])).cast(kind)
        for name, (kind, _) in EXAMPLE_COLUMNS.items()
    ]
    return pa.table(arrays, names=list(EXAMPLE_COLUMNS))

"""Labels without a language model: the set of tokens that best predicts where a latent fires.

Four kinds of rule are tried: the token itself is in the set (*token*), the one before it (*after*), the one behind it
(*before*), or any of the last ``REACH`` tokens (*near*). Sets are chosen on one half of the contexts; the F1, precision
and recall that are reported come from the other half, at the corpus's own rate of firing. Always guessing "fires" has
``F1 = 2 d / (1 + d)`` at density ``d``: a rule that is not better than that gives no label.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.groups import group_top, rank_in_group, systematic
from saelab.features.indexing.postings import Entries
from saelab.features.indexing.statistics import count_tokens

KINDS = ("token", "after", "before", "near")
OFFSETS = (0, -1, 1)
REACH = 16
CANDIDATES = 12  # tokens considered, and the most a set may hold
MIN_SUPPORT = 3  # firings that a token must meet: rarer ones always look precise
MIN_FIRINGS = 8  # in either half
BLANKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
BACKGROUND = 4096  # windows that tell how often a token is near


class Scores(NamedTuple):
    """Counts of a detector, one per slot, in tokens of the corpus half they were taken from."""

    true: NDArray  # predicted and firing
    predicted: NDArray
    firing: NDArray

    def f1(self) -> NDArray:
        return 2 * self.true / np.maximum(self.predicted + self.firing, 1e-9)


class Sets(NamedTuple):
    """Chosen tokens, ordered by slot."""

    slots: NDArray[np.int64]
    tokens: NDArray[np.int64]


class Labeller:
    """Finds labels for ranges of slots of one corpus."""

    def __init__(self, corpus: Corpus, vocabulary: list[str], sample: int, seed: int) -> None:
        self.corpus, self.vocabulary, self.sample = corpus, vocabulary, sample
        self.size = len(vocabulary)
        self.rows_in = np.zeros(2, np.int64)
        # How many rows of each half have a token at each offset.
        self.totals = np.zeros((2, len(OFFSETS), self.size + 1))
        for rows in corpus.row_pieces():
            half = self._half(rows)
            self.rows_in += np.bincount(half, minlength=2)
            for number, offset in enumerate(OFFSETS):
                tokens = half * (self.size + 1) + self._neighbour(rows, offset)
                self.totals[:, number] += np.bincount(tokens, minlength=2 * (self.size + 1)).reshape(2, -1)
        self.nearby = [self._background(h, np.random.default_rng([seed, h])) for h in (0, 1)]
        self.common = np.bitwise_count(self.nearby[0]).sum(1, dtype=np.int64) / BACKGROUND

    def _half(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which half of the contexts a row belongs to: 0 to choose on, 1 to score on."""
        # A multiplicative hash: contexts next to each other often come from one document.
        return (self.corpus.contexts(rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(63)).astype(
            np.int64
        )

    def _neighbour(self, rows: NDArray[np.int64], offset: int) -> NDArray[np.int64]:
        """Token at an offset from each row's, or ``size`` outside its context."""
        window = self.corpus.windows(rows, -min(offset, 0), max(offset, 0))
        at = 0 if offset <= 0 else -1
        return np.where(window.inside[:, at], self.corpus.units[window.places[:, at]], self.size).astype(np.int64)

    def _recent(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last ``REACH`` tokens of each row, its own included; ``size`` outside the context. ``[n, REACH]``."""
        window = self.corpus.windows(rows, REACH - 1, 0)
        return np.where(window.inside, self.corpus.units[window.places], self.size).astype(np.int64)

    def _background(self, half: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Bit ``w`` of line ``t``: token ``t`` is near in the ``w``-th of ``BACKGROUND`` random rows of a half."""
        seen = np.zeros((self.size + 1, BACKGROUND // 8), np.uint8)
        rows = rng.integers(0, self.corpus.n_rows, 16 * BACKGROUND)
        rows = rows[self._half(rows) == half]
        if len(rows):
            number = np.arange(BACKGROUND)
            for column in self._recent(np.resize(rows, BACKGROUND)).T:
                np.bitwise_or.at(seen, (column, number // 8), np.uint8(1) << (number % 8).astype(np.uint8))
        seen[self.size] = 0
        return seen

    def columns(self, entries: Entries, rng: np.random.Generator) -> dict[str, Any]:
        """label, label_score, label_precision and label_recall of every slot of a range."""
        n = len(entries.ptr) - 1
        counts = np.diff(entries.ptr)
        slots, offset, _ = systematic(counts, self.sample, rng)
        rows = entries.rows[entries.ptr[slots] + offset]
        weight = counts / np.maximum(np.minimum(counts, self.sample), 1)
        half = self._half(rows)
        halves = [(slots[half == h], rows[half == h]) for h in (0, 1)]
        firing = [np.bincount(s, minlength=n) for s, _ in halves]
        found = [self._single(halves, number, weight, n) for number in range(len(OFFSETS))]
        # Windows are longer than tokens: fewer of them make the same work.
        early = [rank_in_group(s) < self.sample // 8 for s, _ in halves]
        few = [(s[keep], r[keep]) for (s, r), keep in zip(halves, early)]
        seen = np.bincount(few[0][0], minlength=n) + np.bincount(few[1][0], minlength=n)
        found.append(self._near(few, counts / np.maximum(seen, 1), n))
        fit = np.stack([scores[0].f1() for _, *scores in found])
        best = fit.argmax(0)
        columns = np.arange(n)
        held_out = [np.stack([getattr(f[2], name) for f in found])[best, columns] for name in Scores._fields]
        scores = Scores(*held_out)
        rate = counts / self.corpus.n_rows
        usable = (firing[0] >= MIN_FIRINGS) & (firing[1] >= MIN_FIRINGS)
        usable &= (fit[best, columns] > 2 * rate / (1 + rate)) & (scores.predicted > 0)
        texts = [self._text(best[slot], found[best[slot]][0], slot) if usable[slot] else "" for slot in range(n)]
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "label": texts,
                "label_score": np.where(usable, scores.f1(), np.nan),
                "label_precision": np.where(usable, scores.true / scores.predicted, np.nan),
                "label_recall": np.where(usable, scores.true / scores.firing, np.nan),
            }

    def _single(
        self, halves: list[tuple[NDArray, NDArray]], number: int, weight: NDArray, n: int
    ) -> tuple[Sets, Scores, Scores]:
        """The best set of tokens at one offset; detectors of different tokens never overlap."""
        met = []
        for h, (slots, rows) in enumerate(halves):
            pairs = count_tokens(slots, self._neighbour(rows, OFFSETS[number]), self.size + 1)
            # A token needs support to be chosen; in scoring, all its occurrences count.
            inside = (pairs.tokens < self.size) & (pairs.counts >= (MIN_SUPPORT if h == 0 else 1))
            slots, tokens, counts = (column[inside] for column in pairs)
            met.append((slots, tokens, np.minimum(counts * weight[slots], self.totals[h, number][tokens])))
        slots, tokens, true = met[0]
        frequent = group_top(slots, true, CANDIDATES)
        slots, tokens, true = slots[frequent], tokens[frequent], true[frequent]
        # The best set for F1 is the head of the list ordered by precision.
        order = group_top(slots, true / self.totals[0, number][tokens], CANDIDATES)
        slots, tokens, true = slots[order], tokens[order], true[order]
        total = [np.bincount(s, minlength=n) * weight for s, _ in halves]
        predicted = self.totals[0, number][tokens]
        chosen, fit = _best_prefix(slots, true, predicted, total[0], n)
        sets = Sets(slots[chosen], tokens[chosen])
        hits = np.isin(met[1][0] * (self.size + 1) + met[1][1], sets.slots * (self.size + 1) + sets.tokens)
        held_out = Scores(
            np.bincount(met[1][0][hits], met[1][2][hits], n),
            np.bincount(sets.slots, self.totals[1, number][sets.tokens], n),
            total[1],
        )
        return sets, fit, held_out

    def _near(self, halves: list[tuple[NDArray, NDArray]], weight: NDArray, n: int) -> tuple[Sets, Scores, Scores]:
        """The best set of tokens of which one is near."""
        slots, rows = halves[0]
        recent = np.sort(self._recent(rows), axis=1)
        once = (np.diff(recent, axis=1, prepend=-1) != 0) & (recent < self.size)
        pairs = count_tokens(np.repeat(slots, once.sum(1)), recent[once], self.size + 1)
        total = [np.bincount(s, minlength=n) * weight for s, _ in halves]
        true = pairs.counts * weight[pairs.slots]
        rarely = np.maximum(self.common[pairs.tokens] * self.rows_in[0], true)
        # Support times information: the usual TF-IDF, with the latent's firings as the document.
        value = true * np.log(np.maximum(true * self.rows_in[0] / (rarely * total[0][pairs.slots]), 1.0))
        keep = group_top(pairs.slots, value, CANDIDATES)
        keep = keep[(value[keep] > 0) & (pairs.counts[keep] >= MIN_SUPPORT)]
        chosen = keep[group_top(pairs.slots[keep], (true / rarely)[keep], CANDIDATES)]
        sets = Sets(pairs.slots[chosen], pairs.tokens[chosen])
        added, predicted = self._union(sets, halves[0], 0, weight)
        use, fit = _best_prefix(sets.slots, added, predicted, total[0], n)
        sets = Sets(sets.slots[use], sets.tokens[use])
        added, predicted = self._union(sets, halves[1], 1, weight)
        return sets, fit, Scores(np.bincount(sets.slots, added, n), np.bincount(sets.slots, predicted, n), total[1])

    def _union(self, sets: Sets, half: tuple[NDArray, NDArray], h: int, weight: NDArray) -> tuple[NDArray, NDArray]:
        """What each token adds, in its slot's order: firings near it but near no earlier one, and rows so."""
        place = rank_in_group(sets.slots)
        keys = sets.slots * (self.size + 1) + sets.tokens
        order = np.argsort(keys)
        slots, rows = half
        added = np.zeros(len(keys))
        if len(keys) and len(rows):
            wanted = slots[:, None] * (self.size + 1) + self._recent(rows)
            at = np.searchsorted(keys[order], wanted).clip(0, len(keys) - 1)
            found = np.where(keys[order][at] == wanted, order[at], len(keys)).min(1)  # the earliest of the slot
            hit = found < len(keys)
            added = np.bincount(found[hit], weight[slots[hit]], len(keys))
        bits = np.zeros((int(sets.slots.max(initial=-1)) + 1, CANDIDATES, BACKGROUND // 64), np.uint64)
        bits[sets.slots, place] = self.nearby[h].view(np.uint64)[sets.tokens]
        cumulated = np.bitwise_count(np.bitwise_or.accumulate(bits, axis=1)).sum(2, dtype=np.int64)
        rows_seen = np.diff(cumulated, axis=1, prepend=0)[sets.slots, place] * self.rows_in[h] / BACKGROUND
        return added, np.maximum(rows_seen, added)

    def _text(self, kind: int, sets: Sets, slot: int) -> str:
        a, b = np.searchsorted(sets.slots, [slot, slot + 1])
        words = dict.fromkeys(_visible(self.vocabulary[token]) for token in sets.tokens[a:b])
        return f"{KINDS[kind]}: {' · '.join(words)}"


def _best_prefix(
    slots: NDArray[np.int64], true: NDArray, predicted: NDArray, firing: NDArray, n: int
) -> tuple[NDArray[np.bool_], Scores]:
    """For each slot the head of its list with the best F1: a mask over the list, and its scores."""
    place = rank_in_group(slots)
    table = np.zeros((2, n, CANDIDATES))
    table[0, slots, place], table[1, slots, place] = true, predicted
    table = table.cumsum(2)
    f1 = 2 * table[0] / np.maximum(table[1] + firing[:, None], 1e-9)
    best = f1.argmax(1)
    at = np.arange(n)
    return place <= best[slots], Scores(table[0][at, best], table[1][at, best], firing)


def _visible(token: str) -> str:
    stripped = token.strip()
    # A label of white space alone would read as nothing.
    return stripped if stripped else "".join(BLANKS.get(char, f"U+{ord(char):04X}") for char in token)

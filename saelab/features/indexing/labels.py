"""Labels without a language model: the set of words that best predicts where a latent fires.

Five kinds of rule are tried: the token itself is in the set (*token*), the token with the one before it (*phrase*), the
one before it (*after*), the one behind it (*before*), or any of the last ``REACH`` tokens (*near*). Tokens that differ
in white space at their ends alone are one word.

A firing counts as much as its magnitude over the latent's mean: what the strongest examples share decides, not what
the many weak ones do. With ``m`` the firings met so weighted, ``w`` the tokens where the rule is wrong and ``n`` all
firings, sets are chosen by ``2 m / (m + w + n)``, the F1 score of that weighting, on one half of the contexts. What is
reported comes from the other half, at the corpus's own rate of firing: F1, precision and recall with every firing
counted alike, and the share of the magnitude that is met. Always guessing "fires" has ``F1 = 2 d / (1 + d)`` at density
``d``: a rule that is not better than that gives no label. In the text of a label the word with most magnitude comes
first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.groups import distinct, group_top, rank_in_group, systematic
from saelab.features.indexing.postings import Entries

KINDS = ("token", "after", "before", "phrase", "near")
OFFSETS = {"token": 0, "after": -1, "before": 1}
REACH = 16
CANDIDATES = 24  # words considered
MOST = 12  # words that a set may hold
MIN_SUPPORT = 3  # firings that a word must meet: rarer ones always look precise
MIN_FIRINGS = 8  # in either half
BLANKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
BACKGROUND = 4096  # windows that tell how often a word is near
PAIRS = 1 << 22  # of two words: pairs that fall on one number count as one, so a phrase is never called too precise
SEPARATOR = " · "
POOR = 0.3  # F1 below which a label says little


class Sample(NamedTuple):
    """Sampled firings of one half of the contexts: slot, row, and magnitude over the slot's mean."""

    slots: NDArray[np.int64]
    rows: NDArray[np.int64]
    sizes: NDArray[np.float64]

    def take(self, keep: NDArray) -> Sample:
        """The chosen ones."""
        return Sample(self.slots[keep], self.rows[keep], self.sizes[keep])


class Scores(NamedTuple):
    """Counts of a detector, one per slot, in tokens of the corpus half they were taken from."""

    true: NDArray  # predicted and firing
    mass: NDArray  # the same, each by its magnitude over the slot's mean
    predicted: NDArray
    firing: NDArray

    def f1(self) -> NDArray:
        """Every firing counted alike."""
        return 2 * self.true / np.maximum(self.predicted + self.firing, 1e-9)

    def fit(self) -> NDArray:
        """Every firing counted by its magnitude."""
        return 2 * self.mass / np.maximum(self.mass + self.predicted - self.true + self.firing, 1e-9)


class Words(NamedTuple):
    """Words that slots meet, ordered by slot; what each adds to those before it."""

    slots: NDArray[np.int64]
    words: NDArray[np.int64]
    true: NDArray
    mass: NDArray
    predicted: NDArray

    def take(self, keep: NDArray) -> Words:
        """The chosen ones."""
        return Words(*(column[keep] for column in self))

    def scores(self, firing: NDArray) -> Scores:
        """Of all words of each slot together."""
        n = len(firing)
        true, mass, predicted = (np.bincount(self.slots, x, n) for x in (self.true, self.mass, self.predicted))
        return Scores(true, mass, predicted, firing)


class Labeller:
    """Finds labels for ranges of slots of one corpus."""

    def __init__(self, corpus: Corpus, vocabulary: list[str], sample: int, seed: int) -> None:
        self.corpus, self.vocabulary, self.sample = corpus, vocabulary, sample
        self.names, self.word = _words(vocabulary)
        self.size = len(self.names)
        self.rows_in = np.zeros(2, np.int64)
        # How many rows of each half have a word at each offset, and a pair of words.
        self.totals = {kind: np.zeros((2, self.size + 1)) for kind in OFFSETS} | {"phrase": np.zeros((2, PAIRS + 1))}
        for rows in corpus.row_pieces():
            half = half_of(corpus.contexts(rows))
            self.rows_in += np.bincount(half, minlength=2)
            for kind, totals in self.totals.items():
                numbers, counts = np.unique(half * totals.shape[1] + self._met(kind, rows), return_counts=True)
                totals.reshape(-1)[numbers] += counts
        self.nearby = [self._background(h, np.random.default_rng([seed, h])) for h in (0, 1)]
        self.common = np.bitwise_count(self.nearby[0]).sum(1, dtype=np.int64) / BACKGROUND

    def _met(self, kind: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The word at the kind's offset from each row, or of *phrase* the pair's number; the last number of the kind
        outside the context."""
        if kind == "phrase":
            before, own = self._neighbour(rows, -1), self._neighbour(rows, 0)
            # A multiplicative hash. The second token is as it stands: white space before it begins a word.
            mixed = (before * len(self.word) + own + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            pair = (mixed >> np.uint64(64 - PAIRS.bit_length() + 1)).astype(np.int64)
            return np.where(before < len(self.vocabulary), pair, PAIRS)
        return self.word[self._neighbour(rows, OFFSETS[kind])]

    def _neighbour(self, rows: NDArray[np.int64], offset: int) -> NDArray[np.int64]:
        """Token at an offset from each row's; the length of the vocabulary outside its context."""
        places, inside = self.corpus.beside(rows, offset)
        units = self.corpus.units[places]
        return np.where(inside, units, len(self.vocabulary)).astype(np.int64)

    def _recent(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last ``REACH`` words of each row, its own included; ``size`` outside the context. ``[n, REACH]``."""
        window = self.corpus.windows(rows, REACH - 1, 0)
        return np.where(window.inside, self.word[self.corpus.units[window.places]], self.size)

    def _background(self, half: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Bit ``w`` of line ``t``: word ``t`` is near in the ``w``-th of ``BACKGROUND`` random rows of a half."""
        seen = np.zeros((self.size + 1, BACKGROUND // 8), np.uint8)
        rows = rng.integers(0, self.corpus.n_rows, 16 * BACKGROUND)
        rows = rows[half_of(self.corpus.contexts(rows)) == half]
        if len(rows):
            number = np.arange(BACKGROUND)
            for column in self._recent(np.resize(rows, BACKGROUND)).T:
                np.bitwise_or.at(seen, (column, number // 8), np.uint8(1) << (number % 8).astype(np.uint8))
        seen[self.size] = 0
        return seen

    def columns(self, entries: Entries, rng: np.random.Generator) -> dict[str, Any]:
        """label, label_score, label_precision, label_recall and label_mass of every slot of a range."""
        n = len(entries.ptr) - 1
        counts = np.diff(entries.ptr)
        slots, offset, _ = systematic(counts, self.sample, rng)
        entry = entries.ptr[slots] + offset
        sizes = np.abs(entries.values[entry]).astype(np.float64)
        taken = np.maximum(np.bincount(slots, minlength=n), 1)
        sizes /= np.maximum(np.bincount(slots, sizes, n) / taken, np.finfo(np.float64).tiny)[slots]
        all_firings = Sample(slots, entries.rows[entry], sizes)
        half = half_of(self.corpus.contexts(all_firings.rows))
        halves = [all_firings.take(half == h) for h in (0, 1)]
        firing = [np.bincount(s.slots, minlength=n) for s in halves]
        found = [self._single(halves, kind, counts / taken, n) for kind in KINDS[:-1]]
        # Windows are longer than tokens: fewer of them make the same work.
        few = [s.take(rank_in_group(s.slots) < self.sample // 8) for s in halves]
        seen = sum(np.bincount(s.slots, minlength=n) for s in few)
        found.append(self._near(few, counts / np.maximum(seen, 1), n))
        fit = np.stack([scores.fit() for _, scores, _ in found])
        best, at = fit.argmax(0), np.arange(n)
        scores = Scores(*(np.stack([getattr(f[2], name) for f in found])[best, at] for name in Scores._fields))
        rate = counts / self.corpus.n_rows
        usable = (firing[0] >= MIN_FIRINGS) & (firing[1] >= MIN_FIRINGS)
        usable &= (fit[best, at] > 2 * rate / (1 + rate)) & (scores.predicted > 0)
        texts = [self._text(KINDS[best[s]], found[best[s]][0], s, halves[0]) if usable[s] else "" for s in range(n)]
        firing_mass = np.bincount(halves[1].slots, halves[1].sizes, n) * counts / taken
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "label": texts,
                "label_score": np.where(usable, scores.f1(), np.nan),
                "label_precision": np.where(usable, scores.true / scores.predicted, np.nan),
                "label_recall": np.where(usable, scores.true / scores.firing, np.nan),
                "label_mass": np.where(usable, (scores.mass / firing_mass).clip(max=1.0), np.nan),
            }

    def _single(self, halves: list[Sample], kind: str, weight: NDArray, n: int) -> tuple[Words, Scores, Scores]:
        """The best set of words at one offset, or of pairs; detectors of different ones never overlap."""
        totals = self.totals[kind]
        met, scores = [], []
        for sample, predicted in zip(halves, totals):
            found = _met_by_slot(sample, self._met(kind, sample.rows), totals.shape[1])
            inside = found.words < totals.shape[1] - 1
            slots, words, true, mass, _ = found.take(inside)
            # A systematic sample may meet a word more often than its share.
            scale = np.minimum(true * weight[slots], predicted[words]) / true
            met.append(Words(slots, words, true * scale, mass * scale, predicted[words]))
            scores.append(np.bincount(sample.slots, minlength=n) * weight)
        # A word needs support to be chosen; in scoring, all its occurrences count.
        pool = met[0].take(met[0].true >= MIN_SUPPORT * weight[met[0].slots])
        pool = pool.take(group_top(pool.slots, pool.mass, CANDIDATES))
        # The best set for the weighted F1 is the head of the list ordered by weighted precision.
        pool = pool.take(group_top(pool.slots, pool.mass / (pool.mass + pool.predicted - pool.true), CANDIDATES))
        sets = _by_mass(pool.take(_best_head(pool, scores[0])))
        size = totals.shape[1]
        hits = _among(met[1].slots * size + met[1].words, sets.slots * size + sets.words)
        predicted = np.bincount(sets.slots, totals[1][sets.words], n)
        return sets, sets.scores(scores[0]), met[1].take(hits).scores(scores[1])._replace(predicted=predicted)

    def _near(self, halves: list[Sample], weight: NDArray, n: int) -> tuple[Words, Scores, Scores]:
        """The best set of words of which one is near."""
        recent = np.sort(self._recent(halves[0].rows), axis=1)
        once = recent < self.size
        once[:, 1:] &= recent[:, 1:] != recent[:, :-1]
        each = halves[0].take(np.repeat(np.arange(len(recent)), once.sum(1)))
        pairs = _met_by_slot(each, recent[once], self.size + 1)
        total = [np.bincount(s.slots, minlength=n) * weight for s in halves]
        true, mass = pairs.true * weight[pairs.slots], pairs.mass * weight[pairs.slots]
        rarely = np.maximum(self.common[pairs.words] * self.rows_in[0], true)
        # Support times information: the usual TF-IDF, with the latent's firings as the document.
        value = mass * np.log(np.maximum(mass * self.rows_in[0] / (rarely * total[0][pairs.slots]), 1.0))
        keep = group_top(pairs.slots, value, MOST)
        keep = keep[(value[keep] > 0) & (pairs.true[keep] >= MIN_SUPPORT)]
        chosen = keep[group_top(pairs.slots[keep], (mass / rarely)[keep], MOST)]
        sets = self._union(pairs.slots[chosen], pairs.words[chosen], halves[0], 0, weight)
        sets = sets.take(_best_head(sets, total[0]))
        held_out = self._union(sets.slots, sets.words, halves[1], 1, weight)
        return _by_mass(sets), sets.scores(total[0]), held_out.scores(total[1])

    def _union(self, slots: NDArray, words: NDArray, sample: Sample, h: int, weight: NDArray) -> Words:
        """What each word adds, in its slot's order: firings near it but near no earlier one, and rows so."""
        place, keys = rank_in_group(slots), slots * (self.size + 1) + words
        order = np.argsort(keys)
        true, mass = np.zeros(len(keys)), np.zeros(len(keys))
        if len(keys) and len(sample.rows):
            recent = self._recent(sample.rows)
            listed = np.zeros(self.size + 1, bool)
            listed[words] = True
            near = listed[recent]  # by any slot: most words are not
            wanted = sample.slots[near.nonzero()[0]] * (self.size + 1) + recent[near]
            at = np.searchsorted(keys[order], wanted).clip(0, len(keys) - 1)
            found = np.full(recent.shape, len(keys))
            found[near] = np.where(keys[order][at] == wanted, order[at], len(keys))
            found = found.min(1)  # the earliest of the slot
            hit = found < len(keys)
            each = weight[sample.slots[hit]]
            true = np.bincount(found[hit], each, len(keys))
            mass = np.bincount(found[hit], each * sample.sizes[hit], len(keys))
        bits = np.zeros((int(slots.max(initial=-1)) + 1, MOST, BACKGROUND // 64), np.uint64)
        bits[slots, place] = self.nearby[h].view(np.uint64)[words]
        cumulated = np.bitwise_count(np.bitwise_or.accumulate(bits, axis=1)).sum(2, dtype=np.int64)
        rows_seen = np.diff(cumulated, axis=1, prepend=0)[slots, place] * self.rows_in[h] / BACKGROUND
        return Words(slots, words, true, mass, np.maximum(rows_seen, true))

    def _text(self, kind: str, sets: Words, slot: int, sample: Sample) -> str:
        words = sets.words[slice(*np.searchsorted(sets.slots, [slot, slot + 1]))]
        if kind != "phrase":
            return f"{kind}: {SEPARATOR.join(self.names[word] for word in words)}"
        rows = sample.rows[slice(*np.searchsorted(sample.slots, [slot, slot + 1]))]
        first = dict(zip(self._met(kind, rows[::-1]).tolist(), rows[::-1].tolist()))
        rows = np.array([first[pair] for pair in words.tolist()])
        pairs = zip(self._neighbour(rows, -1), self._neighbour(rows, 0))
        shown = dict.fromkeys(visible(self.vocabulary[a] + self.vocabulary[b]) for a, b in pairs)
        return f"{kind}: {SEPARATOR.join(shown)}"


def half_of(contexts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which half a context (a number as :meth:`Corpus.contexts` gives it) belongs to: 0 to choose on, 1 to score on."""
    # A multiplicative hash: contexts next to each other often come from one document.
    return (contexts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(63)).astype(np.int64)


def visible(token: str) -> str:
    """A token in a label: without white space at its ends, unless it is nothing else."""
    stripped = token.strip()
    # A label of white space alone would read as nothing.
    return stripped if stripped else "".join(BLANKS.get(char, f"U+{ord(char):04X}") for char in token)


def parse_label(label: str) -> tuple[str, list[str]]:
    """Kind and words of a label's text."""
    kind, _, words = label.partition(": ")
    return kind, words.split(SEPARATOR)


def _words(vocabulary: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Different visible words, and the number of each token's; one past the last outside a context."""
    known: dict[str, int] = {}
    numbers = [known.setdefault(visible(token), len(known)) for token in vocabulary]
    return list(known), np.array([*numbers, len(known)], np.int64)


def _met_by_slot(sample: Sample, words: NDArray[np.int64], size: int) -> Words:
    """Each slot's words with firings and magnitude, by slot; nothing is known of ``predicted`` yet."""
    keys, _, inverse = distinct(sample.slots * size + words)
    true, mass = np.bincount(inverse, minlength=len(keys)), np.bincount(inverse, sample.sizes, len(keys))
    return Words(keys // size, keys % size, true, mass, true)


def _best_head(words: Words, firing: NDArray) -> NDArray[np.bool_]:
    """For each slot the head of its list with the best weighted F1, as a mask; of a long head the ``MOST`` words with
    most magnitude."""
    place = rank_in_group(words.slots)
    table = np.zeros((3, len(firing), CANDIDATES))
    for column, values in zip(table, (words.true, words.mass, words.predicted)):
        column[words.slots, place] = values
    true, mass, predicted = table.cumsum(2)
    best = Scores(true, mass, predicted, firing[:, None]).fit().argmax(1)
    head = np.flatnonzero(place <= best[words.slots])
    chosen = np.zeros(len(place), bool)
    chosen[head[group_top(words.slots[head], words.mass[head], MOST)]] = True
    return chosen


def _among(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the keys, in ascending order, are wanted."""
    wanted = np.sort(wanted)
    if not len(wanted):
        return np.zeros(len(keys), bool)
    return wanted[np.searchsorted(wanted, keys).clip(max=len(wanted) - 1)] == keys


def _by_mass(words: Words) -> Words:
    return words.take(group_top(words.slots, words.mass, MOST))

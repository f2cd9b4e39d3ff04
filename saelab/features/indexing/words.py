"""The words that a latent fires on: whole words of the text, which a tokenizer may have cut into pieces.

A word is a run of tokens that join letter to letter or digit: " Mozart" and "ian" are "Mozartian", " music" and "," are
two. A token that begins or ends with a character that has no upper and lower case and is no digit stands alone, as
scripts without spaces need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.groups import distinct, group_top, lists, systematic
from saelab.features.indexing.labels import visible
from saelab.features.indexing.postings import Entries

LONGEST = 32  # tokens that a word may have
_GOLDEN, _ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_SIGN = np.uint64(1 << 63)  # flipped: unsigned numbers in the order of signed ones


class Words:
    """Which word every place of a corpus belongs to."""

    def __init__(self, corpus: Corpus, vocabulary: Sequence[str], sample: int, most: int, seed: int) -> None:
        self.corpus, self.vocabulary = corpus, vocabulary
        self.sample, self.most, self.seed = sample, most, seed
        # An empty string is a part of the character that a later token completes.
        opens = np.array([not text or joins(text[0]) for text in vocabulary])
        closes = np.array([not text or joins(text[-1]) for text in vocabulary])
        n = len(corpus.text)
        self.keys = corpus.array("word_keys", n, np.uint64)
        self.offsets = corpus.array("word_offsets", n, np.int16)  # from the word's first token
        for piece in corpus.pieces():
            shown = np.asarray(corpus.shown[piece])
            continued = np.zeros(len(shown), bool)
            continued[1:] = closes[shown[:-1]] & opens[shown[1:]] & (np.asarray(corpus.positions[piece])[1:] > 0)
            number = np.arange(len(shown))
            offset = number - np.maximum.accumulate(np.where(continued, 0, number))
            offset %= LONGEST
            first = np.flatnonzero(offset == 0)
            # A sum of mixed (token, place in the word): words of the same tokens get the same number.
            mixed = (shown.astype(np.uint64) + np.uint64(1)) * _GOLDEN + offset.astype(np.uint64) * _ODD
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _ODD
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _GOLDEN
            if len(first):
                self.keys[piece] = np.repeat(np.add.reduceat(mixed, first), np.diff(np.append(first, len(shown))))
            self.offsets[piece] = offset

    def columns(self, entries: Entries, start: int) -> dict[str, Any]:
        """``words`` and ``word_shares`` of every slot of a range that begins at ``start``."""
        n, counts = len(entries.ptr) - 1, np.diff(entries.ptr)
        rng = np.random.default_rng([self.seed, start, 1])  # its own: what else is sampled stays as it was
        slots, offset, _ = systematic(counts, self.sample, rng)
        entry = entries.ptr[slots] + offset
        sizes = np.abs(entries.values[entry]).astype(np.float64)
        places = self.corpus.place_of[entries.rows[entry]]
        keys = (self.keys[places] ^ (slots.astype(np.uint64) + np.uint64(1)) * _ODD ^ _SIGN).view(np.int64)
        _, first, inverse = distinct(keys)
        mass, slot = np.bincount(inverse, sizes, len(first)), slots[first]
        best = group_top(slot, mass, self.most)
        total = np.maximum(np.bincount(slots, sizes, n), np.finfo(np.float64).tiny)
        slot, mass, places = slot[best], mass[best], places[first[best]]
        names, numbers = self._texts(places)
        # Words that differ in white space alone are one; ordered by share.
        pairs = slot * max(len(names), 1) + numbers
        _, first, inverse = distinct(pairs)
        shares = np.bincount(inverse, mass / total[slot], len(first))
        order = np.lexsort((first, -shares, slot[first]))
        first, shares = first[order], shares[order]
        words, shares = lists(slot[first], n, names.take(pa.array(numbers[first])), shares)
        return {"words": words, "word_shares": shares}

    def _texts(self, places: NDArray[np.int64]) -> tuple[pa.Array, NDArray[np.int64]]:
        """The different words at places, and the number of each place's."""
        _, first, inverse = distinct(self.keys[places].view(np.int64))
        known: dict[str, int] = {}
        numbers = [known.setdefault(self.at(place), len(known)) for place in places[first].tolist()]
        return pa.array(list(known), pa.string()), np.array(numbers, np.int64)[inverse]

    def at(self, place: int) -> str:
        """The word that the token of a place belongs to."""
        first = place - int(self.offsets[place])
        end = first + 1
        while end < len(self.offsets) and self.offsets[end]:
            end += 1
        numbers: list[int] = self.corpus.shown[first:end].tolist()
        return visible("".join(self.vocabulary[number] for number in numbers))


def joins(character: str) -> bool:
    """Whether a character is part of a word together with its neighbours: a letter with two cases, or a digit."""
    return character.lower() != character.upper() or character.isdigit()

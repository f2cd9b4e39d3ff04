"""The text of a cache, stored flat on disk so that windows can be cut for many rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saelab.data.cache import ActivationCache
from saelab.vocabulary import Vocabulary


class Windows(NamedTuple):
    """Token windows, one per line, cut at context borders: entries outside are marked by ``inside == False``."""

    places: NDArray[np.int64]  # [n, width] position in the text
    inside: NDArray[np.bool_]  # [n, width]


class Corpus:
    """Arrays over the text (every token, stored or not) and over the rows of a cache.

    ``text``, ``documents``, ``roles`` (numbers in ``ROLES``), ``positions`` (in the context) and ``row_at`` (-1 where
    no activation is stored) are indexed by place; ``place_of`` and ``norms`` by row. ``shown`` and ``units`` are the
    numbers of two strings for each place: what a window shows there, and what the token counts as. Both are the token,
    but for a token that is part of a character: it shows the character if it completes it and nothing else, and always
    counts as the character. See :meth:`name_parts`.
    """

    def __init__(self, cache: ActivationCache, folder: Path, n_rows: int) -> None:
        folder.mkdir(parents=True)
        self.n_rows = n_rows
        context = max(cache.manifest.context_length, 1)
        n_text = sum(shard.tokens for shard in cache.manifest.shards)

        self.folder = folder
        self.text = self.array("text", n_text, np.int32)
        self.documents = self.array("documents", n_text, np.int32)
        self.positions = self.array("positions", n_text, np.int32)
        self.row_at = self.array("row_at", n_text, np.int64)
        self.place_of = self.array("place_of", n_rows, np.int64)
        self.norms = self.array("norms", n_rows, np.float32)
        self.roles = self.array("roles", n_text, np.int8)
        self.row_at[:] = -1
        self.shown = self.units = self.text
        base = row = 0
        for (text, documents, slots), roles in zip(cache.shard_texts(), cache.shard_roles()):
            here = slice(base, base + len(text))
            self.text[here] = text.numpy()
            self.documents[here] = documents.numpy()
            self.roles[here] = roles.numpy()
            self.positions[here] = np.arange(len(text)) % context
            kept = slots.numpy()[: max(n_rows - row, 0)]
            self.row_at[base + kept] = np.arange(row, row + len(kept))
            self.place_of[row : row + len(kept)] = base + kept
            base, row = base + len(text), row + len(slots)

    def name_parts(self, vocabulary: Vocabulary, names: list[str]) -> list[str]:
        """Fill ``shown`` and ``units`` with numbers of ``names``, the text of each token id, to which the characters
        that are spread over several tokens are added; returns the longer list."""
        is_part = np.zeros(len(names), bool)
        is_part[list(vocabulary.parts)] = True
        if not any(is_part[self.text[piece]].any() for piece in self.pieces()):
            return names
        self.shown, self.units = (self.array(name, len(self.text), np.int32) for name in ("shown", "units"))
        added: dict[str, int] = {}
        for piece in self.pieces():
            text = np.array(self.text[piece])
            shown, units = text.copy(), text.copy()
            part = is_part[text]
            first = part & ~(np.concatenate([[False], part[:-1]]) & (self.positions[piece] > 0))
            last = part & ~np.concatenate([(part & ~first)[1:], [False]])
            for start, end in zip(np.flatnonzero(first), np.flatnonzero(last) + 1):
                for target, texts in zip((shown, units), vocabulary.run(tuple(text[start:end].tolist()))):
                    target[start:end] = [added.setdefault(t, len(names) + len(added)) for t in texts]
            self.shown[piece], self.units[piece] = shown, units
        return [*names, *added]

    def pieces(self, size: int = 1 << 20) -> Iterator[slice]:
        """The whole text in pieces of whole contexts."""
        start = 0
        while start < len(self.text):
            stop = min(start + size, len(self.text))
            while stop < len(self.text) and self.positions[stop]:
                stop += 1
            yield slice(start, stop)
            start = stop

    def array(self, name: str, n: int, dtype: type) -> NDArray:
        """A new array on disk that the system may page out."""
        mapped = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(max(n, 1),))
        return np.asarray(mapped)  # indexing NumPy's class for mapped files takes several times as long

    def row_pieces(self, size: int = 1 << 18) -> Iterator[NDArray[np.int64]]:
        """All row numbers, a piece at a time."""
        for start in range(0, self.n_rows, size):
            yield np.arange(start, min(start + size, self.n_rows))

    def counted(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """What the token of each row counts as."""
        return self.units[self.place_of[rows]]

    def tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Token of each row."""
        return self.text[self.place_of[rows]]

    def contexts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """A number for the context of each row: the place where it starts."""
        places = self.place_of[rows]
        return places - self.positions[places]

    def beside(self, rows: NDArray[np.int64], offset: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The place at an offset of -1, 0 or 1 from each row's token, and whether it is in the same context."""
        centre = self.place_of[rows]
        places = (centre + offset).clip(0, len(self.text) - 1)
        # A context begins at position 0.
        later = places if offset > 0 else centre
        return places, (places == centre + offset) & ((self.positions[later] > 0) | (offset == 0))

    def windows(self, rows: NDArray[np.int64], before: int, after: int) -> Windows:
        """The places from ``before`` tokens before each row's token to ``after`` behind it."""
        centre, offset = self.place_of[rows], np.arange(-before, after + 1)
        places = centre[:, None] + offset
        # Before the token its position tells how far the context goes, behind it the positions there.
        inside = offset >= -self.positions[centre][:, None]
        np.maximum(places, 0, out=places)
        ahead = places[:, before + 1 :]
        inside[:, before + 1 :] = ahead < len(self.text)
        np.minimum(ahead, len(self.text) - 1, out=ahead)
        inside[:, before + 1 :] &= self.positions[ahead] == self.positions[centre][:, None] + offset[before + 1 :]
        return Windows(places, inside)

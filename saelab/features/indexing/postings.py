"""Codes of a whole corpus on disk, readable by token and by latent.

The pass over the cache appends codes; whenever a run of them is full it is transposed in memory and written, so
memory is bounded by the run and the widest read, not by the corpus. Entries are addressed by *slot*:
``2 * latent`` for positive values, ``2 * latent + 1`` for negative ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import reduce
from numpy.typing import NDArray
from scipy import sparse

from saelab.sparse import SparseCode

RUN_ENTRIES = 1 << 22  # entries held in memory before a run is written: 32 MiB of codes, twice while transposing


class Entries(NamedTuple):
    """Firings of a range of slots, ordered by slot, then row. ``ptr [n_slots + 1]`` delimits the slots."""

    ptr: NDArray[np.int64]
    rows: NDArray[np.int64]
    values: NDArray[np.float32]  # signed

    def slots(self) -> NDArray[np.int64]:
        """The slot of each entry, counted from the first of the range."""
        return np.repeat(np.arange(len(self.ptr) - 1), np.diff(self.ptr))


class PostingsWriter:
    """Collects codes in row order and writes runs into ``folder``."""

    def __init__(self, folder: Path, d_sae: int, run_entries: int = RUN_ENTRIES) -> None:
        self.folder, self.n_slots, self.run_entries = folder, 2 * d_sae, run_entries
        self.runs: list[tuple[int, int]] = []  # first row and number of rows of each
        self.n_rows = 0
        self._held: list[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]] = []
        self._entries = 0
        folder.mkdir(parents=True)

    def add(self, code: SparseCode) -> None:
        """Append the code of the next ``code.n`` rows; stored zeros are dropped."""
        values = code.values.detach().float().cpu().numpy()
        indices, row_ptr = code.indices.cpu().numpy(), code.row_ptr.cpu().numpy()
        counts = np.diff(row_ptr)
        active = values != 0
        if not active.all():
            rows = np.repeat(np.arange(len(counts)), counts)[active]
            counts = np.bincount(rows, minlength=len(counts))
            values, indices = values[active], indices[active]
        slots = (indices * 2 + (values < 0)).astype(np.int32)
        self._held.append((slots, values, counts))
        self._entries += len(slots)
        if self._entries >= self.run_entries:
            self._flush()

    def _flush(self) -> None:
        slots, values, counts = (np.concatenate(parts) for parts in zip(*self._held))
        self._held, self._entries = [], 0
        row_ptr = np.concatenate([[0], np.cumsum(counts)])
        by_row = sparse.csr_matrix((values, slots, row_ptr), shape=(len(counts), self.n_slots))
        by_slot = by_row.tocsc()
        run = len(self.runs)
        for name, array in {
            "row_ptr": row_ptr,
            "slots": slots,
            "ptr": by_slot.indptr.astype(np.int64),
            "rows": by_slot.indices.astype(np.int32),
            "values": by_slot.data,
        }.items():
            np.save(self.folder / f"{run}.{name}.npy", array)
        self.runs.append((self.n_rows, len(counts)))
        self.n_rows += len(counts)

    def finish(self) -> Postings:
        """Write what is held and open the result."""
        if self._held:
            self._flush()
        return Postings(self.folder, self.n_slots, self.runs)


class Postings:
    """Reads what a :class:`PostingsWriter` wrote; arrays stay on disk, and are mapped only while a call reads them."""

    def __init__(self, folder: Path, n_slots: int, runs: list[tuple[int, int]]) -> None:
        self.n_slots, self.runs = n_slots, runs
        self.n_rows = sum(n for _, n in runs)
        self.folder = folder
        self.counts = np.zeros(n_slots, np.int64)
        for run in range(len(runs)):
            self.counts += np.diff(self._open(run, "ptr"))

    def _open(self, run: int, name: str) -> NDArray:
        """An array of a run, mapped for as long as the caller holds it: kept, its pages would count as ours."""
        return np.asarray(np.load(self.folder / f"{run}.{name}.npy", mmap_mode="r"))

    def magnitude_range(self) -> tuple[float, float]:
        """Smallest and largest magnitude of any firing; (1, 1) when nothing fires."""
        low, high = np.inf, 0.0
        for run in range(len(self.runs)):
            for part in _pieces(self._open(run, "values")):
                size = np.abs(part)
                low, high = min(low, float(size.min())), max(high, float(size.max()))
        return (low, high) if high > 0 else (1.0, 1.0)

    def slot_ranges(self, max_entries: int, max_slots: int) -> Iterator[tuple[int, int]]:
        """Consecutive even-aligned slot ranges with few enough entries to hold (one latent's may be more)."""
        start, held = 0, 0
        pairs = reduce(self.counts, "(latent pole) -> latent", "sum", pole=2)
        for latent, count in enumerate(pairs):
            full = held + count > max_entries or 2 * latent - start >= max_slots
            if full and 2 * latent > start:
                yield start, 2 * latent
                start, held = 2 * latent, 0
            held += count
        yield start, self.n_slots

    def entries(self, start: int, stop: int) -> Entries:
        """All firings of slots ``start .. stop``."""
        counts = self.counts[start:stop]
        ptr = np.concatenate([[0], np.cumsum(counts)])
        rows, values = np.empty(ptr[-1], np.int64), np.empty(ptr[-1], np.float32)
        at = ptr[:-1].copy()  # where the next run's entries of each slot go
        for run, (first, _) in enumerate(self.runs):
            own = np.asarray(self._open(run, "ptr")[start : stop + 1])
            part = slice(int(own[0]), int(own[-1]))
            n = np.diff(own)
            to = np.arange(part.stop - part.start) + np.repeat(at - (own[:-1] - own[0]), n)
            rows[to] = self._open(run, "rows")[part].astype(np.int64) + first
            values[to] = self._open(run, "values")[part]
            at += n
        return Entries(ptr, rows, values)

    def codes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """``row_ptr [len(rows) + 1]`` and the active slots of the given rows, which must ascend."""
        counts, parts = np.zeros(len(rows), np.int64), []
        for run, (first, n) in enumerate(self.runs):
            a, b = np.searchsorted(rows, [first, first + n])
            local, row_ptr = rows[a:b] - first, self._open(run, "row_ptr")
            begin, end = row_ptr[local], row_ptr[local + 1]
            counts[a:b] = end - begin
            parts.append(self._open(run, "slots")[spans(begin, end)])
        slots = np.concatenate(parts) if parts else np.empty(0, np.int32)
        return np.concatenate([[0], np.cumsum(counts)]), slots


def spans(begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of ``begin[0] .. end[0]``, then ``begin[1] .. end[1]``, and so on."""
    n = np.asarray(end - begin, np.int64)
    before = np.cumsum(n) - n
    return np.arange(n.sum()) + np.repeat(np.asarray(begin, np.int64) - before, n)


def _pieces(array: NDArray, size: int = 1 << 22) -> Iterator[NDArray]:
    for start in range(0, len(array), size):
        yield np.asarray(array[start : start + size])

"""Find rows: the shard that holds a row, and the position of its token in the shard's text."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.data.cache.manifest import REMEDY, Manifest
from saelab.data.cache.storage import Column, Folder, slices_together
from saelab.errors import UserError, damaged


class Shards:
    """The shards of a cache as one long table. Files are opened, memory-mapped, on first use.

    With those of a ``target``, another cache of the same rows, it has a column "target" of its activations, and the
    column "grads" is the target's.
    """

    def __init__(self, folder: Folder, manifest: Manifest, target: Shards | None = None) -> None:
        self.folder, self.manifest, self.target = folder, manifest, target
        self.starts = [0]
        for shard in manifest.shards:
            self.starts.append(self.starts[-1] + shard.rows)
        self._opened: dict[int, dict[str, Column]] = {}

    def columns(self, index: int) -> dict[str, Column]:
        """The tensors of a shard by name."""
        found = self._opened.get(index)
        if found is None:
            found = self._open(index)
            if self.target is not None:
                other = self.target.columns(index)
                found = {name: column for name, column in found.items() if name != "grads"}
                found |= {name: other[key] for name, key in (("target", "acts"), ("grads", "grads")) if key in other}
            self._opened[index] = found
        return found

    @property
    def grad_scale(self) -> float:
        """What stored gradients are multiplied by."""
        manifest = self.manifest if self.target is None else self.target.manifest
        return manifest.grad_scale or 1.0

    def release(self) -> None:
        """Unmap the files; what is behind a URL takes no memory."""
        if self.folder.local is not None:
            self._opened.clear()
        if self.target is not None:
            self.target.release()

    def _open_together(self, indices: Collection[int]) -> None:
        """Fetch the headers of shards that are not open, where they lie behind a URL."""
        shards = [self.manifest.shards[index] for index in indices if index not in self._opened]
        self.folder.fetch_heads([(shard.file, shard.bytes) for shard in shards])
        if self.target is not None:
            self.target._open_together(indices)

    def _open(self, index: int) -> dict[str, Column]:
        shard, m = self.manifest.shards[index], self.manifest
        with damaged(f"{self.folder.url}/{shard.file}", REMEDY, RuntimeError):
            columns = self.folder.tensors(shard.file)
            wanted = {"acts": (shard.rows, m.d_in), "tokens": (shard.rows,), "slots": (shard.rows,)}
            wanted |= {"text": (shard.tokens,), "documents": (shard.tokens,)}
            for name, shape in wanted.items():
                if columns[name].shape != shape:
                    raise ValueError(f"{name} has shape {columns[name].shape}, expected {shape}")
            return columns

    def row_bytes(self, names: Sequence[str]) -> int:
        """Bytes of one row of the named tensors on disk."""
        columns = self.columns(0)
        return sum(math.prod(columns[name].shape[1:]) * columns[name].dtype.itemsize for name in names)

    def locate(self, row: int) -> tuple[int, int]:
        """Shard number and row within the shard."""
        if not 0 <= row < self.starts[-1]:
            raise UserError(f"row {row} is outside the {self.starts[-1]} rows of {self.folder.url}")
        index = bisect.bisect_right(self.starts, row) - 1
        return index, row - self.starts[index]

    def name(self, row: int) -> tuple[str, int]:
        """Shard file and row within it, for messages."""
        index, local = self.locate(row)
        return self.manifest.shards[index].file, local

    def slot(self, row: int) -> tuple[int, int]:
        """Shard number and the position of the row's token in the shard's text."""
        index, local = self.locate(row)
        return index, int(self.columns(index)["slots"].slices([(local, local + 1)])[0])

    def context_of(self, row: int) -> int:
        """Number of the context that a row belongs to, counted over the cache; all contexts for the end of the rows."""
        if row == self.starts[-1]:
            return self.manifest.n_contexts
        index, slot = self.slot(row)
        before = sum(shard.contexts for shard in self.manifest.shards[:index])
        return before + slot // self.manifest.context_length

    def first_row(self, context: int) -> int:
        """The first row of a context, or of the next one that has rows; the end of the rows if none has."""
        for index, shard in enumerate(self.manifest.shards):
            if context < shard.contexts:
                slots = self.columns(index)["slots"].all()
                return self.starts[index] + int(torch.searchsorted(slots, context * self.manifest.context_length))
            context -= shard.contexts
        return self.starts[-1]

    def documents(self, first: int, stop: int) -> Int[Tensor, " n"]:
        """The number of the document of each row in ``first .. stop``."""
        parts = list(self._documents_by_shard(first, stop))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def document_numbers(self, first: int, stop: int) -> Int[Tensor, " d"]:
        """The numbers of the documents of the rows in ``first .. stop``, ascending; holds the rows of one shard."""
        parts = [part.unique() for part in self._documents_by_shard(first, stop)]
        return torch.cat(parts).unique() if parts else torch.zeros(0, dtype=torch.int64)

    def _documents_by_shard(self, first: int, stop: int) -> Iterator[Int[Tensor, " n"]]:
        for index, (base, end) in enumerate(itertools.pairwise(self.starts)):
            if first < end and base < stop:
                columns, shard = self.columns(index), self.manifest.shards[index]
                slots = columns["slots"].slices([(max(first - base, 0), min(stop, end) - base)])[0].long()
                with damaged(f"{self.folder.url}/{shard.file}", REMEDY, IndexError):
                    found = columns["documents"].all()[slots].long() + shard.document_offset
                yield found

    def divide(self, last: int, contexts: int) -> tuple[int, int]:
        """Divide the first ``contexts`` contexts so that about ``last`` of them are in the second part, and no document
        is in both: the end of the first part and the start of the second.

        A context that ends with the first document of the second part is in neither. Of all such divisions this is the
        one with the nearest number of contexts in the second part, by ratio. Where there is none, because all rows are
        of one document or documents are not in order, the parts share a document and meet at the asked context.
        """
        low, high = self._documents_of_contexts(contexts)
        asked = contexts - last, contexts - last
        if contexts < 2 or not bool((low[1:] >= high[:-1]).all()):
            return asked
        start = torch.arange(1, contexts)
        stop = torch.searchsorted(high, low[1:])
        possible = (stop >= start - 1) & (stop > 0)
        if not possible.any():
            return asked
        start, stop = start[possible], stop[possible]
        best = int(((contexts - start).double() / last).log().abs().argmin())
        return int(stop[best]), int(start[best])

    def _documents_of_contexts(self, contexts: int) -> tuple[Int[Tensor, " c"], Int[Tensor, " c"]]:
        """Lowest and highest document number in each context; that of the rows before where it has no row."""
        low = torch.full((contexts,), torch.iinfo(torch.int64).max)
        high = torch.full((contexts,), -1, dtype=torch.int64)
        done = 0
        for index, shard in enumerate(self.manifest.shards):
            own = self.columns(index)["slots"].all().long() // self.manifest.context_length + done
            numbers = self.documents(self.starts[index], self.starts[index + 1])
            kept = own < contexts
            low.scatter_reduce_(0, own[kept], numbers[kept], "amin")
            high.scatter_reduce_(0, own[kept], numbers[kept], "amax")
            done += shard.contexts
        high = high.cummax(0).values
        return torch.minimum(low, high.clamp_min(0)), high

    def pieces(self, spans: Sequence[tuple[int, int]], names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Rows of each global span, for each named tensor; spans must ascend."""
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for start, stop in spans:
            index = self.locate(start)[0]
            while start < stop:
                base, upper = self.starts[index], min(stop, self.starts[index + 1])
                if start < upper:
                    by_shard.setdefault(index, []).append((start - base, upper - base))
                start, index = max(start, upper), index + 1
        self._open_together(by_shard)
        wanted = [(name, self.columns(index)[name], local) for name in names for index, local in by_shard.items()]
        out: dict[str, list[Tensor]] = {name: [] for name in names}
        for (name, *_), parts in zip(wanted, slices_together([(column, local) for _, column, local in wanted])):
            out[name] += parts
        return out

    def gather(self, rows: Int[Tensor, " n"], names: Sequence[str]) -> dict[str, Tensor]:
        """The given rows of each named tensor, in the given order."""
        ordered, position = rows.sort()
        if len(rows):
            self.locate(int(ordered[0]))
            self.locate(int(ordered[-1]))
        bounds = torch.searchsorted(ordered, torch.tensor(self.starts)).tolist()
        undo = torch.empty_like(position)
        undo[position] = torch.arange(len(rows))
        out = {}
        for name in names:
            parts = [
                self.columns(i)[name].take(ordered[a:b] - self.starts[i])
                for i, (a, b) in enumerate(itertools.pairwise(bounds))
                if b > a
            ]
            out[name] = torch.cat(parts)[undo] if parts else self.columns(0)[name].slices([(0, 0)])[0]
        return out

    def contexts(self, first: int, stop: int) -> Iterator[tuple[Int[Tensor, " m"], Int[Tensor, " m"]]]:
        """Token ids, and row of each token (-1 for none), of each context with a row in ``first .. stop``."""
        length = self.manifest.context_length
        for index, base in enumerate(self.starts[:-1]):
            if base >= stop or self.starts[index + 1] <= first:
                continue
            columns = self.columns(index)
            text, slots = columns["text"].all().long(), columns["slots"].all().long()
            rows = torch.full_like(text, -1)
            rows[slots] = torch.arange(base, base + len(slots))
            for tokens, own in zip(text.split(length), rows.split(length)):
                if first <= int(own.max()) < stop:
                    yield tokens, own

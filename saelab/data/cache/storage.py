"""Folders that may be local or behind any fsspec URL, with atomic writes and tensor files read in place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.data.cache.buffer import Buffer, Range
from saelab.errors import UserError
from saelab.files import LOCK, lock, replace, url_of
from saelab.layout import MANIFEST
from saelab.stores import Lease, Store, lease, mark

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}


HEAD = 1 << 14  # bytes in which the header of a shard is


class Folder:
    """A local folder or an fsspec URL (``s3://bucket/prefix``, ``memory://name``).

    Of a URL, up to ``buffer_bytes`` of what is read as tensors are kept on the local disk while the object lives.
    """

    def __init__(self, path: str | os.PathLike[str], buffer_bytes: int = 0) -> None:
        found = url_of(path)
        self.url = found or str(path).rstrip("/") or "/"
        self.local = None if found else Path(self.url.removeprefix("file://"))
        self._lease: Lease | None = None
        self._seen: Any = None  # the manifest at the first look; see _check_same
        if found:
            self.store = Store(found)
            self._buffer = Buffer(self.store, buffer_bytes)
            self._heads: dict[str, bytes] = {}

    def sub(self, name: str) -> Folder:
        """The folder ``name`` in this one."""
        return Folder(f"{self.url}/{name}")

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder ``name``."""
        return (self.local / name).exists() if self.local else self.store.ask("exists", self.store.key(name))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        try:
            if self.local:
                return (self.local / name).stat().st_size
            return int(self.store.ask("size", self.store.key(name)))
        except FileNotFoundError:
            return None

    def check_bucket(self) -> None:
        """Raise UserError for a URL whose bucket does not exist."""
        if not self.local:
            self.store.check_bucket()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file directly below this folder."""
        if self.local is None:
            return {name: size for name, size in self.store.sizes().items() if "/" not in name}
        found = self.local.iterdir() if self.local.is_dir() else ()
        return {path.name: path.stat().st_size for path in found if path.is_file()}

    def names(self) -> list[str]:
        """Names directly below this folder, sorted, without that of its lock; empty where there is no folder.

        Raises UserError for a URL whose bucket does not exist.
        """
        if self.local:
            return sorted(p.name for p in self.local.iterdir() if p.name != LOCK) if self.local.is_dir() else []
        try:
            found = self.store.ask("ls", self.store.root, detail=False, refresh=True)
        except FileNotFoundError:
            self.store.check_bucket()
            return []
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in found} - {LOCK})

    def read(self, name: str) -> bytes:
        """A whole file."""
        return (self.local / name).read_bytes() if self.local else self.store.read(name)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader, or a crash at any moment, sees all of it or none."""
        if not self.local:  # object stores publish an object when its upload is complete
            if self._lease is not None:
                self._lease.check()
            self.store.write(name, data)
            return
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(target, lambda partial: partial.write_bytes(data))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing this folder while the block lasts."""
        if self.local is not None:
            with lock(self.local):
                yield
            return
        try:
            with lease(self.store) as self._lease:
                yield
        finally:
            self._lease = None

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.local:
            (self.local / name).unlink(missing_ok=True)
            return
        if self._lease is not None:
            self._lease.check()
        self.store.remove(name)

    def sha256(self, name: str) -> str:
        """Checksum of a file, read piece by piece."""
        digest = hashlib.sha256()
        for chunk in self._chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def _chunks(self, name: str) -> Iterator[bytes]:
        if self.local:
            with (self.local / name).open("rb") as file:
                while chunk := file.read(1 << 22):
                    yield chunk
            return
        key, size = self.store.key(name), self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{name} is missing")
        for start in range(0, size, 1 << 26):
            yield from self._buffer.fetch([(key, start, min(start + (1 << 26), size))])

    def tensors(self, name: str) -> dict[str, Column]:
        """The tensors of a safetensors file, none of them loaded."""
        if self.local:
            return _mapped(self.local / name)
        key = self.store.key(name)
        start = self._heads.pop(name, None) or self.store.ask("cat_file", key, start=0, end=HEAD)
        length = struct.unpack("<Q", start[:8])[0]
        if 8 + length > len(start):
            start += self.store.ask("cat_file", key, start=len(start), end=8 + length)
        layout = _layout(start[8 : 8 + length], length)
        columns: dict[str, Column] = {}
        for tensor, (dtype, shape, offset) in layout.items():
            columns[tensor] = RemoteColumn(dtype, shape, key, offset, self._ranges)
        return columns

    def fetch_heads(self, files: Sequence[tuple[str, int]]) -> None:
        """Fetch the headers of several files, given with their bytes, at the same time, for :meth:`tensors`."""
        if self.local is None and files:
            ranges = [(self.store.key(name), 0, min(size, HEAD)) for name, size in files]
            self._heads = dict(zip((name for name, _ in files), self._buffer.fetch(ranges)))

    def _ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        found = self._buffer.read(ranges)
        self._check_same()
        return found

    def _check_same(self) -> None:
        """Raise UserError where the cache was replaced since the first look.

        A writer that replaces a cache removes its manifest first: what was read before a look that finds the manifest
        as it was, is of one cache.
        """
        try:
            about = self.store.ask("info", self.store.key(MANIFEST))
        except FileNotFoundError:
            about = {}
        stamp = mark(about)
        if self._seen is None:
            self._seen = stamp
        elif self._seen != stamp:
            raise UserError(f"{self.url} was replaced while it was read; run the command again")


@dataclass
class Column:
    """A tensor in a file: rows are read on demand."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def slices(self, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Rows ``start : stop`` for each span; views of the file where it is memory-mapped."""
        raise NotImplementedError

    def all(self) -> Tensor:
        """Every row."""
        return self.slices([(0, self.shape[0])])[0]

    def take(self, rows: Int[Tensor, " m"]) -> Tensor:
        """The given rows, which must ascend; neighbours are read together."""
        if rows.numel() == 0:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        cuts = (rows.diff() > 1).nonzero().flatten() + 1
        runs = rows.tensor_split(cuts)
        parts = self.slices([(int(run[0]), int(run[-1]) + 1) for run in runs])
        # A run covers first..last without gaps; a row asked for twice is picked twice.
        return torch.cat([part[run - run[0]] for part, run in zip(parts, runs)])


@dataclass
class MappedColumn(Column):
    """A tensor in a memory-mapped local file."""

    tensor: Tensor

    def slices(self, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [self.tensor[start:stop] for start, stop in spans]

    def take(self, rows: Int[Tensor, " m"]) -> Tensor:
        return self.tensor.index_select(0, rows)


@dataclass
class RemoteColumn(Column):
    """A tensor behind a URL, read by byte ranges."""

    key: str
    offset: int
    fetch: Callable[[Sequence[Range]], list[bytes]]

    def slices(self, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        return slices_together([(self, spans)])[0]

    def asked(self, spans: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """The spans to fetch: all rows at once where there are few bytes and many spans."""
        small = math.prod(self.shape) * self.dtype.itemsize <= WHOLE
        return [(0, self.shape[0])] if small and len(spans) >= FEW else spans

    def ranges(self, spans: Sequence[tuple[int, int]]) -> list[Range]:
        """The bytes of each span of rows."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        return [(self.key, self.offset + a * width, self.offset + b * width) for a, b in spans]

    def rows(self, data: bytes) -> Tensor:
        """The rows in the bytes of a span."""
        if not data:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.dtype).reshape(-1, *self.shape[1:])


WHOLE = 1 << 20  # bytes of a column up to which it is fetched whole, rather than by many small requests
FEW = 4


def slices_together(wanted: Sequence[tuple[Column, Sequence[tuple[int, int]]]]) -> list[list[Tensor]]:
    """:meth:`Column.slices` for several columns of one cache; what is behind a URL is fetched at the same time."""
    remote = [(column, spans) for column, spans in wanted if isinstance(column, RemoteColumn)]
    by_fetch: dict[Any, list[Range]] = {}
    for column, spans in remote:  # a target may lie in another store
        by_fetch.setdefault(column.fetch, []).extend(column.ranges(column.asked(spans)))
    found = {fetch: iter(fetch(ranges)) for fetch, ranges in by_fetch.items()}
    out = []
    for column, spans in wanted:
        if not isinstance(column, RemoteColumn):
            out.append(column.slices(spans))
            continue
        parts = [column.rows(next(found[column.fetch])) for _ in column.asked(spans)]
        out.append([parts[0][a:b] for a, b in spans] if len(parts) < len(spans) else parts)
    return out


def _layout(header: bytes, length: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Name -> (dtype, shape, byte offset in the file) from a safetensors header."""
    entries: dict[str, Any] = json.loads(header)
    entries.pop("__metadata__", None)
    return {
        name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _mapped(path: Path) -> dict[str, Column]:
    with path.open("rb") as file:
        # A private mapping: writable as PyTorch wants it, while the file itself cannot be changed through it.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = struct.unpack("<Q", mapping[:8])[0]
    columns: dict[str, Column] = {}
    for name, (dtype, shape, offset) in _layout(mapping[8 : 8 + length], length).items():
        count = math.prod(shape)
        flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset) if count else torch.empty(0)
        columns[name] = MappedColumn(dtype, shape, flat.to(dtype).reshape(shape))
    return columns

"""Folders that may be local or behind any fsspec URL, with atomic writes and tensor files read in place."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.errors import UserError, first_line
from saelab.files import LOCK, lock, replace

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}


class Folder:
    """A local folder or an fsspec URL (``s3://bucket/prefix``, ``memory://name``)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.url = str(path).rstrip("/")
        self.local: Path | None = None
        if "://" not in self.url or self.url.startswith("file://"):
            self.local = Path(self.url.removeprefix("file://"))
        else:
            try:
                self.fs, self.root = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"cannot open {self.url} ({first_line(error)}); check the address, or install what it needs"
                ) from error

    def _key(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _ask(self, operation: str, *args: Any, **options: Any) -> Any:
        """Call an operation of the store; errors other than OSError (missing credentials) become UserErrors."""
        try:
            return getattr(self.fs, operation)(*args, **options)
        except OSError:
            raise
        except Exception as error:  # each store has its own exceptions, without a common base
            raise UserError(f"{self.url}: {first_line(error)}; check the address and the credentials") from error

    def sub(self, name: str) -> Folder:
        """The folder ``name`` in this one."""
        return Folder(f"{self.url}/{name}")

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder ``name``."""
        return (self.local / name).exists() if self.local else self._ask("exists", self._key(name))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        try:
            return (self.local / name).stat().st_size if self.local else int(self._ask("size", self._key(name)))
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Names directly below this folder, sorted, without that of its lock; empty where there is no folder."""
        if self.local:
            return sorted(p.name for p in self.local.iterdir() if p.name != LOCK) if self.local.is_dir() else []
        try:
            found = self._ask("ls", self.root, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in found})

    def read(self, name: str) -> bytes:
        """A whole file."""
        return (self.local / name).read_bytes() if self.local else self._ask("cat_file", self._key(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader, or a crash at any moment, sees all of it or none."""
        if not self.local:  # object stores publish an object when its upload is complete
            self._ask("makedirs", self._key(name).rsplit("/", 1)[0], exist_ok=True)
            self._ask("pipe_file", self._key(name), data)
            return
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(target, lambda partial: partial.write_bytes(data))

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from writing a local folder; a folder behind a URL has no lock."""
        return nullcontext() if self.local is None else lock(self.local)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.local:
            (self.local / name).unlink(missing_ok=True)
        elif self.exists(name):
            self._ask("rm_file", self._key(name))

    def sha256(self, name: str) -> str:
        """Checksum of a file, read piece by piece."""
        digest = hashlib.sha256()
        with (self.local / name).open("rb") if self.local else self._ask("open", self._key(name), "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    def tensors(self, name: str) -> dict[str, Column]:
        """The tensors of a safetensors file, none of them loaded."""
        if self.local:
            return _mapped(self.local / name)
        head = 1 << 16
        key = self._key(name)
        start = self._ask("cat_file", key, start=0, end=head)
        length = struct.unpack("<Q", start[:8])[0]
        header = start[8 : 8 + length] if 8 + length <= head else self._ask("cat_file", key, start=8, end=8 + length)
        columns: dict[str, Column] = {}
        for tensor, (dtype, shape, offset) in _layout(header, length).items():
            columns[tensor] = RemoteColumn(dtype, shape, offset, lambda spans: self._ranges(key, spans))
        return columns

    def _ranges(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._ask("cat_ranges", [key] * len(spans), [a for a, _ in spans], [b for _, b in spans])


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

    offset: int
    fetch: Callable[[Sequence[tuple[int, int]]], list[bytes]]

    def slices(self, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        row = self.shape[1:]
        width = math.prod(row) * self.dtype.itemsize
        wanted = [(self.offset + a * width, self.offset + b * width) for a, b in spans if b > a]
        parts = iter(self.fetch(wanted))  # an empty range is an error for some stores
        return [
            torch.frombuffer(bytearray(next(parts)), dtype=self.dtype).reshape(-1, *row)
            if b > a
            else torch.empty((0, *row), dtype=self.dtype)
            for a, b in spans
        ]


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

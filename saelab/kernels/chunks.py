"""The encoder's product in chunks of rows, and memory that is used again instead of being asked for anew.

A fresh ``[4096, 16384]`` float32 output costs more in page faults than the selection that reads it, so the CPU
product goes into a buffer that is lent out, returned and lent again. Buffers are lent to one caller at a time.
Outputs as large as a weight matrix come from :func:`recycled`.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 1 << 26  # 64 MiB holds 1024 rows at d_sae = 16384; fewer rows slow the library product down
DEVICE_CHUNK_BYTES = 1 << 29  # a GPU needs more rows at a time to be busy
MIN_ROWS = 128
ROWS = 4096  # rows of a block that is split by columns

RECYCLED = 1 << 18  # elements from which an output is worth recycling
KEPT = 8  # idle blocks kept at most

_lock = threading.Lock()
_blocks: list[np.ndarray] = []
_idle: list[Tensor] = []
_elsewhere: list[Callable[[], None]] = []


def products(x: Tensor, W: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first row, x[rows] @ W)`` for consecutive rows; a chunk is valid until the next one.

    An empty batch yields one empty chunk.
    """
    n, width = x.shape[0], W.shape[1]
    rows = chunk_rows(n, width, x.element_size(), CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES)
    with scratch(rows * width, x) as flat:
        for start in range(0, max(n, 1), max(rows, 1)):
            part = x[start : start + rows]
            yield start, torch.mm(part, W, out=flat[: part.shape[0] * width].view(part.shape[0], width))


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    return x if b_dec is None else x - b_dec


def pre_act_chunks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """:func:`products` of the centred activations, with the encoder's bias: ``(x - b_dec) @ W_enc + b_enc``."""
    for start, z in products(centred(x, b_dec), W_enc):
        yield start, z if b_enc is None else z.add_(b_enc)


def blocks(x: Tensor, W: Tensor) -> Generator[tuple[int, int, Tensor]]:
    """Yield ``(first row, first column, a block of x @ W)``: all columns of a group of rows, then the next group.

    On the CPU a block of whole columns costs the library less than one of whole rows: the packed ``W`` serves all rows.
    """
    n, width = x.shape[0], W.shape[1]
    rows = _even(n, ROWS, 1)
    columns = _even(width, CHUNK_BYTES // x.element_size() // max(rows, 1), 64)
    with scratch(rows * columns, x) as flat:
        for row in range(0, max(n, 1), max(rows, 1)):
            part = x[row : row + rows]
            for column in range(0, width, columns):
                piece = W[:, column : column + columns]
                out = flat[: part.shape[0] * piece.shape[1]].view(part.shape[0], piece.shape[1])
                yield row, column, torch.mm(part, piece, out=out)


def _even(total: int, most: int, multiple: int) -> int:
    """A piece size near ``most`` that divides ``total`` into pieces of nearly equal size."""
    pieces = max(1, round(total / max(most, multiple)))
    return -(-total // (pieces * multiple)) * multiple


def chunk_rows(n: int, d_sae: int, itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows per chunk, so that a chunk stays near ``chunk_bytes`` and the chunks are of nearly equal size."""
    most = max(MIN_ROWS, chunk_bytes // max(d_sae * itemsize, 1))
    pieces = -(-n // most)
    return -(-n // max(pieces, 1))


@contextmanager
def scratch(numel: int, like: Tensor) -> Iterator[Tensor]:
    """A flat buffer of ``numel`` elements of ``like``'s dtype and device, with undefined content."""
    size = numel * like.element_size()
    if like.device.type != "cpu":
        # The GPU's allocator caches, and knows which stream still reads the memory.
        yield torch.empty(numel, dtype=like.dtype, device=like.device)
        return
    buffer = _borrow(size)
    try:
        yield buffer[:size].view(like.dtype)
    finally:
        with _lock:
            _idle.append(buffer)


def recycled(*shape: int) -> Tensor:
    """A float32 CPU tensor with undefined content, on memory of an earlier one that nobody refers to any more.

    A gradient as large as its weights is allocated and freed at every step; on fresh pages that costs as much time as
    the sums that fill it. A tensor made by ``from_numpy`` holds a reference to the array as long as its storage lives.
    """
    numel = math.prod(shape)
    if numel < RECYCLED:
        return torch.empty(shape)
    with _lock:
        idle = [i for i in range(len(_blocks)) if _references(i) <= _unused]
        match = next((i for i in idle if _blocks[i].size == numel), None)
        if match is None:
            for i in reversed(idle[KEPT - 1 :]):
                del _blocks[i]
            _blocks.append(torch.empty(numel).numpy())
            match = len(_blocks) - 1
        return torch.from_numpy(_blocks[match]).view(shape)


def _references(i: int) -> int:
    return sys.getrefcount(_blocks[i])


_blocks.append(np.empty(0, np.float32))
_unused = _references(0)  # what an array counts that only the list refers to
_blocks.clear()


def on_release(clear: Callable[[], None]) -> Callable[[], None]:
    """Decorator: have :func:`release` also call ``clear``, for memory that is kept elsewhere."""
    _elsewhere.append(clear)
    return clear


def release() -> None:
    """Give all idle buffers back to the allocator, and what was kept for reuse, such as a Gram matrix."""
    for clear in _elsewhere:
        clear()
    with _lock:
        _idle.clear()
        _blocks[:] = [_blocks[i] for i in range(len(_blocks)) if _references(i) > _unused]


def _borrow(size: int) -> Tensor:
    with _lock:
        fitting = [i for i, buffer in enumerate(_idle) if buffer.numel() >= size]
        if fitting:
            return _idle.pop(min(fitting, key=lambda i: _idle[i].numel()))
        if _idle:
            _idle.pop()  # too small for the work at hand: let it go rather than hoard
    return torch.empty(size, dtype=torch.uint8)

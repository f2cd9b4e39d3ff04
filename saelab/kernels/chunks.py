"""The encoder's product in chunks of rows, and memory that is used again instead of being asked for anew.

A fresh ``[4096, 16384]`` float32 output costs more in page faults than the selection that reads it, so the CPU
product goes into a buffer that is lent out, returned and lent again. Buffers are lent to one caller at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 26  # 64 MiB holds 1024 rows at d_sae = 16384; fewer rows slow the library product down
MIN_ROWS = 128

_lock = threading.Lock()
_idle: dict[torch.device, list[Tensor]] = {}


def pre_act_chunks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first row, (x - b_dec) @ W_enc + b_enc)`` for consecutive rows; a chunk is valid until the next one.

    An empty batch yields one empty chunk.
    """
    n, d_sae = x.shape[0], W_enc.shape[1]
    rows = chunk_rows(n, d_sae, x.element_size())
    centred = x if b_dec is None else x - b_dec
    with scratch(rows * d_sae, x) as flat:
        for start in range(0, max(n, 1), max(rows, 1)):
            part = centred[start : start + rows]
            out = flat[: part.shape[0] * d_sae].view(part.shape[0], d_sae)
            torch.mm(part, W_enc, out=out)
            if b_enc is not None:
                out += b_enc
            yield start, out


def chunk_rows(n: int, d_sae: int, itemsize: int) -> int:
    """Rows per chunk, so that a chunk stays near ``CHUNK_BYTES`` and the chunks are of nearly equal size."""
    most = max(MIN_ROWS, CHUNK_BYTES // max(d_sae * itemsize, 1))
    pieces = -(-n // most)
    return -(-n // max(pieces, 1))


@contextmanager
def scratch(numel: int, like: Tensor) -> Iterator[Tensor]:
    """A flat buffer of ``numel`` elements of ``like``'s dtype and device, with undefined content."""
    size = numel * like.element_size()
    buffer = _borrow(size, like.device)
    try:
        yield buffer[:size].view(like.dtype)
    finally:
        with _lock:
            _idle.setdefault(like.device, []).append(buffer)


def release() -> None:
    """Give all idle buffers back to the allocator."""
    with _lock:
        _idle.clear()


def _borrow(size: int, device: torch.device) -> Tensor:
    with _lock:
        idle = _idle.get(device, [])
        fitting = [i for i, buffer in enumerate(idle) if buffer.numel() >= size]
        if fitting:
            return idle.pop(min(fitting, key=lambda i: idle[i].numel()))
        if idle:
            idle.pop()  # too small for the work at hand: let it go rather than hoard
    return torch.empty(size, dtype=torch.uint8, device=device)

"""Reuse of CPU memory instead of new allocations.

A fresh ``[4096, 16384]`` float32 output costs more in page faults than the selection that reads it. Buffers of
:func:`scratch` are lent to one caller at a time; outputs as large as a weight matrix come from :func:`recycled`.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

RECYCLED = 1 << 18  # elements from which an output is worth recycling
KEPT = 8  # idle blocks kept at most

_lock = threading.Lock()
_blocks: list[np.ndarray] = []
_idle: list[Tensor] = []
_elsewhere: list[Callable[[], None]] = []


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
            _idle.pop()  # too small for the current work: free it
    return torch.empty(size, dtype=torch.uint8)

"""From shards to batches: windows are loaded one ahead, batches cut from them two ahead."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache.order import BLOCK, Order, Window, read_ahead
from saelab.data.cache.shards import Shards
from saelab.errors import UserError


class Batch(NamedTuple):
    """Rows of a cache, in raw units."""

    acts: Float[Tensor, "n d_in"]  # float32
    grads: Float[Tensor, "n d_in"] | None  # float32: gradient of the summed LM loss at the hook
    tokens: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]  # row numbers in the cache


class Buffers:
    """Memory for windows, kept between passes: getting fresh memory takes longer than filling it."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    @contextmanager
    def pair(self, size: int) -> Iterator[list[Tensor]]:
        """Two buffers of ``size`` bytes: one to read from while the other fills."""
        held = []
        for _ in range(2):
            found = self._free.pop() if self._free else torch.empty(0, dtype=torch.uint8)
            held.append(found if len(found) >= size else torch.empty(size, dtype=torch.uint8))
        try:
            yield held
        finally:
            self._free += held


def stream(
    shards: Shards, buffers: Buffers, order: Order, names: Sequence[str], batch_size: int, start: int, end: int
) -> Iterator[Batch]:
    """Rows ``start : end`` of a pass, as batches."""
    size = min(order.window_blocks * BLOCK, order.n) * shards.row_bytes(names)
    with buffers.pair(size) as pair:
        # By the time a third window loads, nothing reads from the first any more: batches hold copies.
        windows = zip(order.windows(start), itertools.cycle(pair))
        loaded = ((window, _load(shards, window, names, buffer)) for window, buffer in windows)
        cut = _cut(read_ahead(loaded, 1), batch_size, end - start)
        yield from read_ahead((make_batch(shards, parts) for parts in cut), 2)


def _load(shards: Shards, window: Window, names: Sequence[str], buffer: Tensor) -> dict[str, Tensor]:
    """The window's rows in corpus order; a view of the file where they lie in one piece, else in ``buffer``."""
    held: dict[str, Tensor] = {"rows": window.rows()}
    used = 0
    for name, pieces in shards.pieces(window.spans, names).items():
        if len(pieces) == 1:
            held[name] = pieces[0]
            continue
        shape, dtype = (window.length, *pieces[0].shape[1:]), pieces[0].dtype
        room = buffer[used : used + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        held[name] = torch.cat(pieces, out=room)
        used += room.nbytes
    return held


def _cut(
    windows: Iterator[tuple[Window, dict[str, Tensor]]], batch_size: int, remaining: int
) -> Iterator[list[dict[str, Tensor]]]:
    """The parts of each batch; a batch may span windows."""
    parts: list[dict[str, Tensor]] = []
    missing = min(batch_size, remaining)
    for window, held in windows:
        at = window.skip
        while at < window.length and remaining > 0:
            take = min(missing, window.length - at)
            parts.append({name: window.pick(loaded, at, at + take) for name, loaded in held.items()})
            at, missing, remaining = at + take, missing - take, remaining - take
            if missing == 0:
                yield parts
                parts, missing = [], min(batch_size, remaining)


def make_batch(shards: Shards, parts: list[dict[str, Tensor]]) -> Batch:
    """One batch in raw units; UserError where an activation is not finite."""
    held = parts[0]
    if len(parts) > 1:
        held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    acts, rows = held["acts"].float(), held["rows"]
    _check_finite(shards, acts, rows)
    grads = None
    if "grads" in held:
        grads = held["grads"].float().div_(shards.manifest.grad_scale or 1.0)
    return Batch(acts, grads, held["tokens"].long(), rows)


def _check_finite(shards: Shards, acts: Tensor, rows: Tensor) -> None:
    # The sum is cheap, and finite for all sane data; only a suspicious batch is searched.
    if torch.isfinite(acts.sum()):
        return
    bad = (~acts.isfinite().all(1)).nonzero()
    if len(bad):
        file, local = shards.name(int(rows[bad[0, 0]]))
        raise UserError(
            f"{shards.folder.url}/{file} has a non-finite activation in row {local}; harvest the cache again"
        )

"""Read shards and cut batches from them: one window and two batches are prepared ahead."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache.order import Order, Window, read_ahead
from saelab.data.cache.shards import Shards
from saelab.errors import UserError
from saelab.kernels import gather_rows
from saelab.kernels.memory import recycled

HUGE = 1 << 21  # bytes of a huge page


class Batch(NamedTuple):
    """Rows of a cache, in raw units."""

    acts: Float[Tensor, "n d_in"]  # float32
    grads: Float[Tensor, "n d_in"] | None  # float32: gradient of the summed LM loss at the hook
    tokens: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]  # row numbers in the cache
    target: Float[Tensor, "n d_out"] | None = None  # float32: activations of the target cache; grads are then there


class Buffers:
    """Memory for windows, kept between passes, because allocating memory takes longer than filling it."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    @contextlib.contextmanager
    def pair(self, size: int) -> Iterator[list[Tensor]]:
        """Two buffers of ``size`` bytes: one to read from while the other fills."""
        held = []
        for _ in range(2):
            try:
                found = self._free.pop()  # atomic: several threads may read one cache
            except IndexError:
                found = torch.empty(0, dtype=torch.uint8)
            held.append(found if len(found) >= size else _huge(size))
        try:
            yield held
        finally:
            self._free += held


def _huge(size: int) -> Tensor:
    """Memory in huge pages if available: random reads in a large window mostly wait for page lookups."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < HUGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, -(-size // HUGE) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel built without huge pages refuses; ordinary pages are used then.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def stream(
    shards: Shards,
    buffers: Buffers,
    order: Order,
    names: Sequence[str],
    batch_size: int,
    start: int,
    end: int,
    head: int | None = None,
) -> Generator[Batch]:
    """Rows ``start : end`` of a pass, as batches, the first of ``head`` rows where that is given."""
    size = order.window_rows * shards.row_bytes(names)
    with buffers.pair(size) as pair:
        # By the time a third window loads, nothing reads from the first any more: batches hold copies.
        windows = zip(order.windows(start), itertools.cycle(pair))
        loaded = ((window, _load(shards, window, names, buffer)) for window, buffer in windows)
        drafts = _cut(read_ahead(loaded, 1), batch_size, end - start, head or batch_size)
        yield from read_ahead((make_batch(shards, draft.held, draft.finite) for draft in drafts), 2)


def _load(shards: Shards, window: Window, names: Sequence[str], buffer: Tensor) -> dict[str, Tensor]:
    """The window's rows in corpus order; a view of the file where they lie in one piece, else in ``buffer``."""
    held: dict[str, Tensor] = {"rows": window.rows()}
    used = 0
    for name, found in shards.pieces(window.spans, names).items():
        pieces = window.loaded(found)
        if len(pieces) == 1:
            held[name] = pieces[0]
            continue
        shape, dtype = (window.length, *pieces[0].shape[1:]), pieces[0].dtype
        room = buffer[used : used + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        held[name] = torch.cat(pieces, out=room)
        used += room.nbytes
    return held


class _Draft:
    """A batch that is being filled: activations and gradients in float32, the rest as it is on disk.

    Rows are copied at once, because the window they come from is about to be overwritten.
    """

    def __init__(self, held: dict[str, Tensor], size: int) -> None:
        self.size, self.filled, self.finite = size, 0, True
        self.held: dict[str, Tensor] = {}
        for name, loaded in held.items():
            shape = (size, *loaded.shape[1:])
            self.held[name] = recycled(*shape) if loaded.is_floating_point() else loaded.new_empty(shape)

    def add(self, window: Window, held: dict[str, Tensor], start: int, stop: int) -> None:
        """Append emitted rows ``start : stop`` of a window."""
        rows = window.emitted(start, stop)
        for name, out in self.held.items():
            to = out[self.filled : self.filled + stop - start]
            if out.is_floating_point():
                finite = gather_rows(held[name], rows, to)
                self.finite &= finite or name == "grads"
            else:
                torch.index_select(held[name], 0, rows, out=to)
        self.filled += stop - start


def _cut(
    windows: Iterator[tuple[Window, dict[str, Tensor]]], batch_size: int, remaining: int, head: int
) -> Iterator[_Draft]:
    """Filled drafts, the first of ``head`` rows; a batch may span windows."""
    draft, size = None, head
    for window, held in windows:
        at = window.skip
        while at < window.length and remaining > 0:
            draft = draft or _Draft(held, min(size, remaining))
            take = min(draft.size - draft.filled, window.length - at)
            draft.add(window, held, at, at + take)
            at, remaining = at + take, remaining - take
            if draft.filled == draft.size:
                yield draft
                draft, size = None, batch_size


def make_batch(shards: Shards, held: dict[str, Tensor], finite: bool | None = None) -> Batch:
    """One batch in raw units. Raises UserError for non-finite activations, unless they are known to be finite."""
    acts, rows = held["acts"].float(), held["rows"]
    target = held["target"].float() if "target" in held else None
    if finite is None:
        finite = bool(acts.isfinite().all()) and (target is None or bool(target.isfinite().all()))
    if not finite:
        refuse(shards, rows)
    grads = None
    if "grads" in held:
        grads = held["grads"].float().div_(shards.grad_scale)
    return Batch(acts, grads, held["tokens"].long(), rows, target)


def refuse(shards: Shards, rows: Int[Tensor, " n"]) -> NoReturn:
    """Raise UserError for the first of the rows whose activation is not finite; there must be one."""
    found = ~shards.gather(rows, ("acts",))["acts"].isfinite().all(1)
    if shards.target is not None and not found.any():
        refuse(shards.target, rows)
    file, local = shards.name(int(rows[int(found.nonzero()[0])]))
    raise UserError(f"{shards.folder.url}/{file} has a non-finite activation in row {local}; harvest the cache again")


def moved(batches: Generator[Batch], device: torch.device | str) -> Generator[Batch]:
    """The batches with their activations and gradients on a device."""
    with contextlib.closing(batches):
        for batch in batches:
            grads = None if batch.grads is None else batch.grads.to(device)
            target = None if batch.target is None else batch.target.to(device)
            yield batch._replace(acts=batch.acts.to(device), grads=grads, target=target)

"""Batches from a window that lives on the GPU: files go there in the type they are stored in, and are permuted there.

The window and its order are those of the reader on the CPU (:mod:`saelab.data.cache.batches`), so both give the same
rows in the same order, bit for bit. A thread copies the blocks of the next window through two pinned buffers on a
stream of its own, while batches are picked from the present one on the stream of the caller. The caller never waits for
the device, and the copies wait for the caller's work only where they overwrite a window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from saelab.data.cache.batches import Batch, refuse
from saelab.data.cache.order import Order, Window, read_ahead
from saelab.data.cache.shards import Shards

STAGING = 32 << 20  # bytes of one pinned buffer
SHARE = 0.5  # of the free memory of a device: what its two windows may take


class Mark(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Return when the device has come this far."""
        ...


class Transport(Protocol):
    """What moves bytes to a device, in order, beside the caller's own work there."""

    device: torch.device

    def staging(self) -> list[Tensor]:
        """Two buffers of ``STAGING`` bytes on the CPU that the device reads by itself."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the device for queued work."""
        ...

    def queue(self, work: Callable[[], object]) -> Mark:
        """Let ``work``, which must not wait for the device, follow what was queued before it; returns its end."""
        ...

    def fetch(self, make: Callable[[], Tensor]) -> Tensor:
        """The result of a last piece of work, on the CPU; waits for it."""
        ...

    def caller_waits(self, mark: Mark) -> None:
        """Let the caller's later work on the device begin after ``mark``."""
        ...

    def caller_mark(self) -> Mark:
        """The end of the caller's work so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """Let work that is queued from now on begin after the caller's ``mark``."""
        ...

    def finish(self) -> None:
        """Return when everything is done on both sides, so that memory may be freed."""
        ...


class Cuda:
    """A copy stream on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._staging: list[Tensor] = []

    def staging(self) -> list[Tensor]:
        if not self._staging:
            self._staging = [torch.empty(STAGING, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        return self._staging

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # The allocator hands memory out again in the order of the stream that it was made on, which is the copy stream.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def queue(self, work: Callable[[], object]) -> Any:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()

    def fetch(self, make: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return make().cpu()

    def caller_waits(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def caller_mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Any) -> None:
        self._stream.wait_event(mark)

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def transport_for(device: torch.device | str | None, window_bytes: int) -> Transport | None:
    """How batches get to ``device`` by :func:`feed`, with two windows of ``window_bytes`` there.

    None means the reader on the CPU: for other devices than CUDA's, and where the windows would take more than half of
    the device's free memory. The order of the rows is the same either way.
    """
    device = None if device is None else torch.device(device)
    if device is None or device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return Cuda(device) if 2 * window_bytes <= SHARE * free else None


def window_bytes(shards: Shards, order: Order, names: Sequence[str]) -> int:
    """Bytes that one window of an order takes, in the types that are stored."""
    return order.window_rows * shards.row_bytes([n for n in names if n != "tokens"])


def feed(
    shards: Shards,
    transport: Transport,
    order: Order,
    names: Sequence[str],
    batch_size: int,
    start: int,
    end: int,
    head: int | None = None,
) -> Generator[Batch]:
    """Rows ``start : end`` of a pass, as batches on the device of ``transport``; ``tokens`` and ``rows`` on the CPU.

    The rows are those of :func:`saelab.data.cache.batches.stream`, in its order. Raises UserError at the batch with the
    first non-finite activation, as it does.
    """
    slots = itertools.cycle([_Slot(), _Slot()])
    loaded = (_load(shards, transport, window, names, slot) for window, slot in zip(order.windows(start), slots))
    windows = read_ahead(loaded, 1)
    try:
        yield from _cut(shards, transport, windows, batch_size, end - start, head or batch_size)
    finally:
        windows.close()  # ends the loading thread, whose queue may hold copies still
        transport.finish()


@dataclass
class _Slot:
    """The memory of a window on the device, and the end of the caller's reading from it."""

    memory: dict[str, Tensor] = field(default_factory=dict)
    read: Mark | None = None

    def take(self, transport: Transport, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a tensor; the memory of an earlier window where that is large enough."""
        size = math.prod(shape)
        held = self.memory.get(name)
        if held is None or held.numel() < size:
            held = self.memory[name] = transport.empty((size,), dtype)
        return held[:size].view(shape)


@dataclass
class _Loaded:
    """A window on the device."""

    window: Window
    slot: _Slot
    held: dict[str, Tensor]  # acts and grads on the device, tokens and rows on the CPU
    order: Tensor  # on the device: which of the loaded rows is emitted next
    ready: Mark
    bad: Tensor  # loaded rows whose activations are not finite, on the CPU


def _load(shards: Shards, transport: Transport, window: Window, names: Sequence[str], slot: _Slot) -> _Loaded:
    """Copy a window's rows into a slot, and look for non-finite activations there."""
    if slot.read is not None:
        transport.wait(slot.read)  # the caller's last look at what is overwritten
    held: dict[str, Tensor] = {"rows": window.rows()}
    finite = transport.empty((window.length,), torch.bool)
    transport.queue(lambda: finite.fill_(True))
    for name, found in shards.pieces(window.spans, names).items():
        pieces = window.loaded(found)
        if not pieces[0].is_floating_point():
            held[name] = torch.cat(pieces)
            continue
        held[name] = slot.take(transport, name, (window.length, *pieces[0].shape[1:]), pieces[0].dtype)
        _copy(transport, pieces, held[name], finite if name in ("acts", "target") else None)
    bad = torch.empty(0, dtype=torch.int64)
    if not bool(transport.fetch(finite.all)):
        bad = (~transport.fetch(lambda: finite)).nonzero().flatten()
    order, moved = window.emitted(0, window.length), transport.empty((window.length,), torch.int64)
    ready = transport.queue(lambda: moved.copy_(order))
    return _Loaded(window, slot, held, moved, ready, bad)


def _copy(transport: Transport, pieces: Sequence[Tensor], room: Tensor, finite: Tensor | None) -> None:
    """Fill ``room`` with the rows of ``pieces`` through the pinned buffers; ``finite`` gets which of them are."""
    buffers: list[tuple[Tensor, Mark | None]] = [(buffer, None) for buffer in transport.staging()]
    at, width = 0, math.prod(room.shape[1:]) * room.dtype.itemsize  # a process may have no row in a window
    for parts in _groups(pieces, max(STAGING // width, 1)):
        buffer, busy = buffers.pop(0)
        if busy is not None:
            busy.synchronize()  # this thread waits, the caller does not
        n = sum(len(part) for part in parts)
        staged = torch.cat(parts, out=buffer[: n * width].view(room.dtype).view(n, *room.shape[1:]))
        work = _arrival(staged, room[at : at + n], None if finite is None else finite[at : at + n])
        buffers.append((buffer, transport.queue(work)))
        at += n
    for _, busy in buffers:
        if busy is not None:
            busy.synchronize()


def _groups(pieces: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """The rows of ``pieces`` in groups of at most ``most`` rows."""
    group: list[Tensor] = []
    room = most
    for piece in pieces:
        while len(piece):
            part, piece = piece[:room], piece[room:]
            group.append(part)
            room -= len(part)
            if room == 0:
                yield group
                group, room = [], most
    if group:
        yield group


def _arrival(staged: Tensor, to: Tensor, finite: Tensor | None) -> Callable[[], None]:
    def work() -> None:
        to.copy_(staged, non_blocking=True)
        if finite is not None:
            finite.logical_and_(to.isfinite().all(1))

    return work


class _Draft:
    """A batch on the device that is being filled, in float32."""

    def __init__(self, first: _Loaded, size: int) -> None:
        self.size, self.filled, self.bad = size, 0, False
        self.held: dict[str, Tensor] = {}
        for name, loaded in first.held.items():
            dtype = torch.float32 if loaded.is_floating_point() else loaded.dtype
            self.held[name] = torch.empty((size, *loaded.shape[1:]), dtype=dtype, device=loaded.device)

    def add(self, loaded: _Loaded, start: int, stop: int) -> None:
        """Append emitted rows ``start : stop`` of a window."""
        rows = loaded.window.emitted(start, stop)
        for name, out in self.held.items():
            source = loaded.held[name]
            picks = loaded.order[start:stop] if source.is_floating_point() else rows
            out[self.filled : self.filled + stop - start].copy_(source.index_select(0, picks))
        if loaded.bad.numel():
            self.bad |= bool(torch.isin(rows, loaded.bad).any())
        self.filled += stop - start


def _cut(
    shards: Shards, transport: Transport, windows: Iterator[_Loaded], batch_size: int, remaining: int, head: int
) -> Iterator[Batch]:
    """Batches, the first of ``head`` rows; one may span windows."""
    draft, size = None, head
    for loaded in windows:
        transport.caller_waits(loaded.ready)
        at = loaded.window.skip
        while at < loaded.window.length and remaining > 0:
            draft = draft or _Draft(loaded, min(size, remaining))
            take = min(draft.size - draft.filled, loaded.window.length - at)
            draft.add(loaded, at, at + take)
            at, remaining = at + take, remaining - take
            if draft.filled == draft.size:
                yield _batch(shards, draft)
                draft, size = None, batch_size
        if remaining == 0:
            return
        loaded.slot.read = transport.caller_mark()


def _batch(shards: Shards, draft: _Draft) -> Batch:
    held = draft.held
    if draft.bad:
        refuse(shards, held["rows"])
    grads = held["grads"].div_(shards.grad_scale) if "grads" in held else None
    return Batch(held["acts"], grads, held["tokens"].long(), held["rows"], held.get("target"))

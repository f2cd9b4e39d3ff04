"""The order in which rows are read: seeded, token-level, and possible for a cache far larger than memory.

Rows are cut into blocks of contiguous rows. Each pass draws a random order of the blocks, loads as many of them as
fit a window, and emits the rows of the window in random order. A pass is a function of (rows, seed, epoch, window),
so any batch of it can be reached without reading the ones before.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

BLOCK = 256  # rows read from one place: long enough for a disk, short enough to mix
SLOW = 60.0  # seconds without data after which it is said that the storage does not answer
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """One pass over rows ``first .. first + n``; ``seed=None`` is corpus order.

    Of each run of ``batch`` rows of the pass, process ``part`` of ``parts`` reads that part alone; rows are then
    counted among its own.
    """

    first: int
    n: int
    seed: int | None
    epoch: int
    window_blocks: int
    batch: int = 1
    part: int = 0
    parts: int = 1

    @property
    def window_rows(self) -> int:
        """The most rows of a window."""
        rows = min(self.window_blocks * BLOCK, self.n)
        return rows if self.parts == 1 else (rows // self.batch + 2) * (self.batch // self.parts)

    def windows(self, start: int) -> Iterator[Window]:
        """The windows of the pass from row number ``start`` on, which begins a batch where these are divided."""
        start *= self.parts
        n_blocks = -(-self.n // BLOCK)
        blocks = np.arange(n_blocks)
        if self.seed is not None:
            blocks = np.random.default_rng([self.seed, self.epoch]).permutation(n_blocks)
        done = 0
        for number, begin in enumerate(range(0, n_blocks, self.window_blocks)):
            chosen = np.sort(blocks[begin : begin + self.window_blocks])
            length = len(chosen) * BLOCK
            if chosen[-1] == n_blocks - 1:
                length -= n_blocks * BLOCK - self.n
            if done + length > start:
                window = self._window(number, chosen, length, max(start - done, 0))
                yield window if self.parts == 1 else self._own(window, done)
            done += length

    def _own(self, window: Window, done: int) -> Window:
        """The rows of this process in a window that begins with row ``done`` of the pass."""
        place = torch.arange(done, done + window.length) % self.batch
        mine = place // (self.batch // self.parts) == self.part
        emitted = window.emitted(0, window.length)[mine]
        own = emitted.sort().values
        return replace(
            window,
            length=len(own),
            order=torch.searchsorted(own, emitted),
            skip=int(mine[: window.skip].sum()),
            own=own,
        )

    def _window(self, number: int, blocks: np.ndarray, length: int, skip: int) -> Window:
        # Neighbouring blocks become one span, so that a window over everything is a single read.
        cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
        spans = [
            (self.first + int(run[0]) * BLOCK, self.first + min((int(run[-1]) + 1) * BLOCK, self.n))
            for run in np.split(blocks, cuts)
        ]
        order = None
        if self.seed is not None:
            order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch, number]).permutation(length))
        return Window(spans, length, order, skip)


@dataclass(frozen=True)
class Window:
    """Row spans to load, in corpus order, and the order in which to emit their rows after the first ``skip``.

    With ``own`` only these rows of the spans are loaded.
    """

    spans: list[tuple[int, int]]
    length: int
    order: Int[Tensor, " length"] | None
    skip: int
    own: Int[Tensor, " length"] | None = None  # ascending, counted in the spans

    def emitted(self, start: int, stop: int) -> Int[Tensor, " m"]:
        """Which of the loaded rows are emitted as rows ``start : stop``."""
        return torch.arange(start, stop) if self.order is None else self.order[start:stop]

    def rows(self) -> Int[Tensor, " length"]:
        """Global row numbers of the loaded rows."""
        rows = torch.cat([torch.arange(start, stop) for start, stop in self.spans])
        return rows if self.own is None else rows[self.own]

    def loaded(self, pieces: list[Tensor]) -> list[Tensor]:
        """The rows to load of the pieces of all spans, which are not read where they are memory-mapped."""
        if self.own is None:
            return pieces
        starts = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0)
        own = self.own.tensor_split(torch.searchsorted(self.own, starts[1:-1]))
        return [piece.index_select(0, rows - start) for piece, rows, start in zip(pieces, own, starts)]


def read_ahead(items: Iterator[T], depth: int) -> Generator[T]:
    """Run ``items`` in a thread, at most ``depth`` items ahead of the consumer; errors surface in the consumer."""
    ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
    silent = False
    room = threading.Semaphore(depth)
    stopped = threading.Event()
    end = object()

    def work() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                item = next(items, end)
                ready.put((item, None))
                if item is end:
                    return
                del item
        except BaseException as error:
            ready.put((end, error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="saelab-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = ready.get(timeout=SLOW)
            except queue.Empty:
                silent = _tell(silent, True)
                continue
            silent = _tell(silent, False)
            if error is not None:
                raise error
            if item is end:
                return
            room.release()
            yield item
            del item
    finally:
        stopped.set()
        room.release()
        # A read from storage that hangs cannot be broken off: it must not keep the caller from ending.
        thread.join(SLOW if not silent else 0)


def _tell(silent: bool, now: bool) -> bool:
    """Say once that no data come, and once that they come again; returns ``now``."""
    if now and not silent:
        _log.warning("no data for %.0f s: the storage is slow or does not answer; still waiting", SLOW)
    if silent and not now:
        _log.warning("data arrive again")
    return now

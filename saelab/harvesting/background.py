"""Work that follows the model's passes, done by a thread, so that the model does not wait for it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DEPTH = 2  # pieces of work that may wait: what they refer to takes the memory of so many passes


class Background:
    """Runs pieces of work one after another in a thread; an error of one is raised by the next call."""

    active: list[Background] = []  # noqa: RUF012  (of this process; a benchmark waits for them)

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="saelab-harvest", daemon=True)
        self._thread.start()
        self.active.append(self)

    def submit(self, work: Callable[[], None]) -> None:
        """Queue a piece of work; waits while too much is queued."""
        self._until(lambda: len(self._waiting) < DEPTH)
        with self._changed:
            self._waiting.append(work)
            self._changed.notify_all()

    def drain(self) -> None:
        """Return when everything that was submitted is done."""
        self._until(lambda: not self._waiting and not self._busy)

    def close(self) -> None:
        """End the thread; work that has not begun is dropped."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
        if self in self.active:
            self.active.remove(self)

    def _until(self, true: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or true())
            if self._error is not None:
                error, self._error = self._error, None
                raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                work, self._busy = self._waiting.popleft(), True
                self._changed.notify_all()
            error: BaseException | None = None
            try:
                work()
            except BaseException as raised:
                error = raised
            del work  # and the activations that it refers to
            with self._changed:
                self._busy, self._error = False, self._error or error
                if error is not None:
                    self._waiting.clear()
                self._changed.notify_all()


class Beside:
    """Streams of CUDA devices for work on what a pass has made, beside the next pass; nothing on other devices."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def made(self, tensors: Sequence[Tensor]) -> dict[torch.device, Any]:
        """The present end of the passes on the devices of ``tensors``, for :meth:`after`."""
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        return {device: torch.cuda.current_stream(device).record_event() for device in devices}

    @contextlib.contextmanager
    def after(self, made: dict[torch.device, Any]) -> Iterator[None]:
        """Queue the block's work after that end, on streams of its own; it must wait for its results itself."""
        with contextlib.ExitStack() as stack:
            for device, event in made.items():
                stream = self._streams.get(device)
                if stream is None:
                    stream = self._streams[device] = torch.cuda.Stream(device)
                stream.wait_event(event)
                stack.enter_context(torch.cuda.stream(stream))
            yield

"""Stop a long run: the first SIGINT or SIGTERM lets the current step finish, the second one stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Which signal asked to stop, if any has."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it, so that a scheduler sees an unfinished job; else 0."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside the block the first SIGINT or SIGTERM sets ``Stop.signal``; then the usual handlers are restored."""
    stop, before = Stop(), {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()

"""The clock of all benchmarks: wall and processor time of named pieces of work that alternate.

Turns let a busy machine slow all pieces alike, so the ratio of two of them, taken turn by turn, holds where their
speeds do not. Processor time counts all threads of the process, and holds also where other programs compete for the
cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Seconds(NamedTuple):
    """Wall time and processor time, or a quotient of each."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """The two clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Seconds) -> Seconds:
        """The time since ``start``."""
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


class Clock:
    """The times of named pieces of work, one entry for each time that a piece ran.

    ``wait`` is called around each piece: on a GPU, for the work that was started to end.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.times: dict[str, list[Seconds]] = {}
        self._wait = wait

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do ``work`` and record how long it took."""
        self._wait()
        start = Seconds.now()
        result = work()
        self._wait()
        self.add(name, Seconds.now().since(start))
        return result

    def add(self, name: str, seconds: Seconds) -> None:
        """Record a time that was measured elsewhere."""
        self.times.setdefault(name, []).append(seconds)

    def rounds(self, jobs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> None:
        """Let ``jobs`` take turns ``rounds`` times, after ``warm_up`` turns that do not count."""
        for turn in range(warm_up + rounds):
            for name, job in jobs.items():
                self.time(name, job)
            if turn < warm_up:
                self.clear()

    def clear(self) -> None:
        """Discard the times so far, such as those of the first turn, which compiles and allocates."""
        self.times.clear()

    def total(self, name: str) -> Seconds:
        """The sum over all turns."""
        return Seconds(*map(sum, zip(*self.times.get(name, []) or [(0.0, 0.0)])))

    def median(self, name: str) -> Seconds:
        """The median over turns."""
        return Seconds(*map(statistics.median, zip(*self.times[name])))

    def ratio(self, name: str, other: str) -> Seconds:
        """The median over turns of the time of ``name`` over that of ``other`` in the same turn."""
        pairs = zip(self.times[name], self.times[other])
        return Seconds(*map(statistics.median, zip(*((a.wall / b.wall, a.cpu / b.cpu) for a, b in pairs))))


def write_out(out: Path | None, content: Any) -> None:
    """Write what a benchmark found, as JSON, where ``--out`` says."""
    if out is not None:
        from saelab.files import write_json  # not above: the clock is also used where saelab is not installed

        write_json(out, content)

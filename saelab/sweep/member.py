"""One SAE of a sweep while it trains."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saelab.files import write_json
from saelab.sweep.grid import Entry
from saelab.training import StepMetrics

TIMES = ".seconds"  # ends the names of the files that say how long the steps of an SAE took
Status = Literal["running", "finished", "halted", "diverged"]


@dataclass(eq=False)
class Member:
    """One SAE of a sweep while it trains."""

    entry: Entry
    folder: Path
    step: int = 0
    stop_at: int | None = None  # the step at which successive halving stops it
    status: Status = "running"
    message: str = ""
    last: StepMetrics | None = None
    run: Generator[StepMetrics] | None = None
    seconds: float = 0.0  # of processor time, in the steps counted next
    timed: int = 0
    tried: list[dict[str, Any]] = field(default_factory=list)  # learning rates, where it was tuned; see choice.Group

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time of all its steps, from those that were timed; None where there are none.

        The first one, in which kernels may be compiled, does not count.
        """
        return self.seconds / self.timed * self.step if self.timed else None

    def read_times(self, path: Path) -> None:
        """Take over what the processes that have trained it before measured; nothing if there is no such file."""
        with suppress(OSError, ValueError):
            self.seconds, self.timed = json.loads(path.read_bytes())

    def write_times(self, path: Path) -> None:
        """Leave them to the processes that train it later, or measure it."""
        if self.timed:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, [self.seconds, self.timed])

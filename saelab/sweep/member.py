"""One SAE of a sweep while it trains."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saelab.sweep.grid import Entry
from saelab.training import StepMetrics

Status = Literal["running", "finished", "halted", "diverged"]


@dataclass
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
        """Processor time of all its steps, from those that this process has timed; None where there are none.

        The first one, in which kernels may be compiled, does not count.
        """
        return self.seconds / self.timed * self.step if self.timed else None

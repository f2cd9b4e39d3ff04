"""In what condition a run is: in training, interrupted, complete, or damaged, and which file is."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from saelab.errors import UserError, damaged
from saelab.layout import METRICS, RUN, WEIGHTS
from saelab.runs import Run
from saelab.runs.metrics_log import read_metrics

SILENCE = 120.0  # seconds without a new line in the log after which nothing is being trained any more


@dataclass(frozen=True)
class Progress:
    """How far the training of a run has come."""

    step: int
    planned: int | None
    """The steps it was to take; None where no file says."""
    silent: float
    """Seconds since the last line of its log."""

    @property
    def state(self) -> str:
        """``finished``, ``running`` or ``interrupted``."""
        if self.planned is not None and self.step >= self.planned:
            return "finished"
        return "running" if self.silent < SILENCE else "interrupted"

    def text(self) -> str:
        """The state in words, with the step where it is not the last one."""
        if self.state == "finished":
            return "finished"
        of = "" if self.planned is None else f" of {self.planned:,}"
        return f"{self.state}, step {self.step:,}{of}"


def progress(run: Run) -> Progress | None:
    """How far a run has come by now; None where it has no log. Raises UserError for a damaged one."""
    if run.path is None or not (rows := read_metrics(run.path / METRICS, tail=4096)):
        return None
    plan, planned, step = run.path / RUN, None, 0
    with damaged(plan if plan.is_file() else run.path / METRICS, "write the run again"):
        step = int(rows[-1]["step"])
        planned = json.loads(plan.read_bytes())["steps"] if plan.is_file() else run.metadata.get("steps")
    if planned is None and run.has_weights:
        planned = step  # weights are written at the end
    return Progress(step, planned, _seconds_since_change(run.path / METRICS))


def _seconds_since_change(path: Path) -> float:
    """Seconds since a file was written.

    The clock of the machine that writes it, or of a file server, may differ from the one here. Where the file has
    changed under the eyes of this process, its own clock counts from then. Before that the two are compared; a time in
    the future, which they cannot both mean, counts from the first look.
    """
    stamp, now = path.stat().st_mtime, time.monotonic()
    seen = _seen.get(path)
    if seen is None or stamp != seen.stamp:
        seen = _seen[path] = _Seen(stamp, now, changed=seen is not None and stamp > seen.stamp)
    watched = now - seen.at
    return watched if seen.changed else max(time.time() - stamp, watched)


class _Seen(NamedTuple):
    stamp: float
    at: float  # on the monotonic clock
    changed: bool  # it had another stamp before, an earlier one


_seen: dict[Path, _Seen] = {}


def damage(run: Run) -> str | None:
    """One line on the first file of a run that cannot be read, None where all can; of weights the header is read."""
    if "error" in run.config:
        return run.config["error"]
    if run.path is None:
        return None
    weights = run.path / WEIGHTS
    try:
        if weights.is_file():  # a truncated file does not have the length that its header says
            with damaged(weights, "copy or train it again", SafetensorError), safe_open(weights, "pt"):
                pass
        _ = run.evaluation, run.last_step
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or run.path} cannot be read now ({error.strerror})"
    return None


def state(run: Run) -> str:
    """One or a few words for the list of runs: what is wrong with it, or how far it is."""
    if (wrong := damage(run)) is not None:
        return wrong
    if run.is_foreign:
        return f"from {run.config['format']}"
    found = progress(run)
    if found is None or found.state == "finished":
        return "ready" if run.has_weights else "no weights"
    return found.text()

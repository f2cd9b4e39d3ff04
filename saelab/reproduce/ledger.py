"""Ledgers: what a paper claims, what was measured here, and the verdict, with hardware, seeds and duration."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from saelab._version import __version__
from saelab.files import write_json
from saelab.metrics import t_interval

Verdict = Literal["supported", "contradicted", "inconclusive", "floor", "not attributable", "not testable here"]
"""``supported``: the whole 95 % interval lies on the side that the paper claims; ``contradicted``: on the other side;
``inconclusive``: it reaches over zero; ``floor``: the baseline has so little of the effect that it cannot be reduced;
``not attributable``: what was measured is shown by a control too, so that it does not speak for the paper."""
FLOOR = 0.01  # share of dead latents of the baseline, below which fewer of them cannot be shown


@dataclass(frozen=True)
class Row:
    """One claim. ``measured`` holds the numbers the verdict rests on; ``reason`` says how it follows from them."""

    paper: str
    claim: str
    setting: str
    measured: dict[str, Any]
    verdict: Verdict
    reason: str
    synthetic: bool = False  # on planted data, whose answer is known
    shows: str = ""  # dotted path to the number of ``measured`` to print; the first difference if empty
    expected: Verdict = "supported"  # of a synthetic row: what was found when it was written

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass
class Ledger:
    """The rows of one run of ``saelab reproduce``."""

    paper: str
    quick: bool
    seeds: list[int]
    rows: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    options: str = ""  # what follows on the command line
    data: dict[str, Any] = field(default_factory=dict)  # the activations behind the rows that are not synthetic
    seconds: float = 0.0  # of this invocation
    seconds_training: float = 0.0  # of every SAE on real activations behind the rows, those kept from earlier included

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "saelab_version": __version__,
            "paper": self.paper,
            "command": f"saelab reproduce {self.paper}" + (" --quick" if self.quick else "") + self.options,
            "quick": self.quick,
            "seeds": self.seeds,
            "hardware": hardware(),
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.started)),
            "seconds": self.seconds,
            "seconds_training": self.seconds_training,
            "settings": self.settings,
            "data": self.data,
            "rows": [row.content() for row in self.rows],
        }

    def save(self, path: Path | str) -> None:
        """Write the ledger as JSON, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.content())


def hardware() -> dict[str, Any]:
    """The processor and the libraries that the numbers come from."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        name = models[0] if models else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with Student's 95 % interval, and the values themselves."""
    sample = np.asarray(values, dtype=np.float64)
    low, high = t_interval(sample)
    return {"mean": float(sample.mean()), "low": low, "high": high, "values": sample.tolist()}


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """The difference ``a - b`` seed by seed: both were trained on the same data in the same order."""
    return summary([x - y for x, y in zip(a, b, strict=True)])


def below(difference: dict[str, Any]) -> Verdict:
    """The verdict on a paired difference that the paper says is negative."""
    if difference["low"] is None:
        return "inconclusive"
    return "supported" if difference["high"] < 0 else "contradicted" if difference["low"] > 0 else "inconclusive"


def above(difference: dict[str, Any]) -> Verdict:
    """The verdict on a paired difference that the paper says is positive."""
    if difference["low"] is None:
        return "inconclusive"
    return "supported" if difference["low"] > 0 else "contradicted" if difference["high"] < 0 else "inconclusive"


def within(difference: dict[str, Any], margin: float) -> Verdict:
    """The verdict on a difference that the paper says is no larger than ``margin``."""
    return below({name: difference[name] - margin for name in ("low", "high")})


def fewer(difference: dict[str, Any], baseline: Sequence[float]) -> Verdict:
    """As :func:`below`; ``floor`` where the mean of the baseline's shares is below ``FLOOR``."""
    return below(difference) if float(np.mean(baseline)) >= FLOOR else "floor"


def attributed(verdict: Verdict, control: Verdict) -> Verdict:
    """A supported claim whose control, the same test against what lacks the paper's idea, does not support it too."""
    return "not attributable" if verdict == "supported" and control != "supported" else verdict


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Supported or contradicted where every part is; else the weakest part."""
    found = set(verdicts)
    if len(found) == 1:
        return verdicts[0]
    order: tuple[Verdict, ...] = ("not testable here", "floor", "not attributable", "inconclusive")
    parts: list[Verdict] = [verdict for verdict in order if verdict in found]
    return parts[0] if parts else order[-1]


def decided(holds: bool) -> Verdict:
    """The verdict of a test that has no interval."""
    return "supported" if holds else "contradicted"

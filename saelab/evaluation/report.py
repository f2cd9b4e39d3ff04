"""The evaluation of a run as one object: numbers with formula, sample and interval; written to ``evaluation.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saelab._version import __version__
from saelab.files import write_json
from saelab.layout import EVALUATION
from saelab.metrics import LEGACY, Estimate
from saelab.sae import SAE

FEW_DOCUMENTS = 20
NEAR = 0.05  # relative difference of a measured L0 from the requested one up to which it goes without saying


@dataclass
class Evaluation:
    """What :func:`saelab.evaluation.evaluate` measured.

    Attributes:
        metrics: name -> estimate; FVU first. Other tools' formulas are under ``legacy`` in the file.
        histogram: latents over log10(density).
        settings: what was evaluated on what, and how special positions were treated.
        timing: seconds, and the ratio to the language model's own passes where one ran.
        by_document: tokens, squared error and squared deviation from the mean of each held-out document.
        tasks: results of :func:`saelab.evaluation.run_tasks` by task, where any ran.
    """

    metrics: dict[str, Estimate]
    histogram: dict[str, Any]
    settings: dict[str, Any]
    timing: dict[str, float] = field(default_factory=dict)
    by_document: dict[str, list[float]] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of a metric."""
        return self.metrics[name].value

    def content(self) -> dict[str, Any]:
        """The content of ``evaluation.json``."""
        return {
            "saelab_version": __version__,
            "metrics": {name: e.row() for name, e in self.metrics.items() if name not in LEGACY},
            "legacy": {name: e.row() for name, e in self.metrics.items() if name in LEGACY},
            **({"tasks": self.tasks} if self.tasks else {}),
            "by_document": self.by_document,
            "density_histogram": self.histogram,
            "settings": self.settings,
            "timing": self.timing,
        }

    def save(self, folder: Path | str) -> Path:
        """Write ``evaluation.json`` into a run folder."""
        path = Path(folder) / EVALUATION
        write_json(path, self.content())
        return path


def fit_remark(fvu: float) -> str | None:
    """One sentence if a reconstruction is worse than the mean of the activations, which every SAE of them beats."""
    if not fvu >= 1:
        return None
    return (
        f"FVU is {fvu:.3g}: the reconstruction is further from these activations than their mean is, so this SAE was "
        "not trained on such; check its hook point, its model and the factor of the activations (input_scale), and "
        "whether it is a transcoder"
    )


def l0_remark(sae: SAE, evaluation: Evaluation) -> str | None:
    """One sentence if the measured L0 is more than 5 % from the number of latents per token that ``sae`` asked for."""
    asked, found = sae.config.get(sae.l0_option), evaluation["l0"]
    if not isinstance(asked, int | float) or asked <= 0 or abs(found / asked - 1) <= NEAR:
        return None
    return (
        f"L0 is {found:.3g} on these tokens where {sae.l0_option}={asked:g} was asked for ({found / asked - 1:+.1%}); "
        "what limits it was set on training tokens, or in training"
    )


def split_remark(evaluation: Evaluation) -> str | None:
    """One sentence if the held-out rows are of few documents, or of documents that were trained on."""
    settings = evaluation.settings
    count, trained = settings.get("documents", 0), settings.get("documents_trained_on", 0)
    if settings.get("split") != "held_out" or not count:
        return None
    if trained:
        return (
            f"{trained} of the {count} held-out documents have training rows too, so these numbers flatter; a cache "
            "of several documents that is harvested now holds out whole documents"
        )
    if count < FEW_DOCUMENTS:
        return (
            f"the held-out rows are of {count} documents; other text may differ by more than the intervals say: "
            "harvest more and shorter documents, or a larger --held-out share"
        )
    return None

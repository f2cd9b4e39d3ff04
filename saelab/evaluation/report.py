"""The evaluation of a run as one object: numbers with formula, sample and interval; written to ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from saelab._version import __version__
from saelab.files import write_json
from saelab.layout import EVALUATION
from saelab.metrics import LEGACY, Estimate
from saelab.sae import SAE

FEW_DOCUMENTS = 20
# The metrics that are printed; the file has them all.
SHOWN = (
    *("fvu", "l0", "cosine", "relative_reconstruction_bias", "dead_fraction", "dense_fraction"),
    *("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_recovered_zero", "ce_loss_recovered_mean"),
    *("kl_div_with_sae", "kl_recovered_zero", "latents_shared_by_seeds", "latents_shared_by_chance"),
)
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
        controls: the same numbers of each control (:mod:`saelab.evaluation.controls`), where any were measured.
    """

    metrics: dict[str, Estimate]
    histogram: dict[str, Any]
    settings: dict[str, Any]
    timing: dict[str, float] = field(default_factory=dict)
    by_document: dict[str, list[float]] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Any] = field(default_factory=dict)

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
            **({"controls": self.controls} if self.controls else {}),
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


def headline(task: str, found: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a task worth a line, by name; none for one that could not be done."""
    if "cannot" in found:
        return []
    rows: list[tuple[str, float]] = []
    if task == "probing":
        for label, metrics in found.items():
            rows += [(f"{label}: {name.removesuffix('_test_accuracy')}", e["value"]) for name, e in metrics.items()]
    elif task in ("scr", "tpp"):
        for label, metrics in found.items():
            rows += [(f"{label}: {n} ablated", score) for n, score in metrics["score"].items()]
            beside = {
                "random": metrics["score_random_latents"],
                "whole latents": metrics.get("whole_latents", {}).get("score", {}),
            }
            for what, scores in beside.items():  # in a file the numbers of latents are texts
                rows += [(f"{label}: {n} {what}", score) for n, score in scores.items() if str(n) == "20"]
    elif task == "sae-probes":
        rows = [(name, e["value"]) for name, e in found["means"].items() if not name.endswith("f1")]
    elif task in ("two-sided", "labels"):
        rows = [(name, e["value"]) for name, e in found.items() if isinstance(e, dict)]
    else:
        rows = list(found.items())
    return rows


class Row(NamedTuple):
    """One number of an SAE, and of each control that has it."""

    name: str
    value: float
    controls: dict[str, float]


def control_rows(content: Mapping[str, Any]) -> list[Row]:
    """The numbers of an ``evaluation.json`` worth a line, each with those of its controls."""
    controls = content.get("controls") or {}
    own = _numbers(content)
    others = {name: _numbers(found) for name, found in controls.items()}
    return [
        Row(name, value, {control: numbers[name] for control, numbers in others.items() if name in numbers})
        for name, value in own.items()
    ]


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    metrics = content.get("metrics") or {}
    found = {name: metrics[name]["value"] for name in SHOWN if name in metrics}
    for task, numbers in (content.get("tasks") or {}).items():
        found |= {f"{task} {name}": value for name, value in headline(task, numbers)}
    return found

"""Every number of an evaluation again for each control, and the table that sets them side by side."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, near_matches
from saelab.evaluation import EvaluateConfig, evaluate, spliced
from saelab.evaluation.controls.dictionaries import random_directions, raw_channels, untrained
from saelab.evaluation.controls.trained import Report, frozen_dictionary, random_transformer, recipe
from saelab.evaluation.tasks.battery import TaskConfig, run_tasks
from saelab.layout import CONTROLS as FOLDER
from saelab.sae import SAE
from saelab.sae.normalised import Normalised

CONTROLS = {
    "untrained": "the same SAE before its first training step, its centre and thresholds set on the data",
    "frozen_dictionary": "the same SAE trained with its dictionary frozen at random directions (arXiv 2602.14111)",
    "random_directions": "differences of random pairs of activations as latents, as many active as in the SAE",
    "raw_channels": "the channels of the activations as latents, as many active as in the SAE",
    "random_transformer": "an SAE trained in the same way on the same tokens through the model with all parameters "
    "drawn at random, each with its own mean and standard deviation (arXiv 2501.17727); measured on its activations",
}


@dataclass(frozen=True)
class ControlConfig:
    """Whether and with what to compare."""

    controls: bool = False
    """Set beside each number that of an untrained SAE, a frozen dictionary, random directions, raw channels, and an SAE
    on the model with random weights. The second and the last are trained, which takes as long as the SAE took."""
    control_kinds: tuple[str, ...] = ()
    """Only these: untrained, frozen_dictionary, random_directions, raw_channels, random_transformer."""
    control_seed: int = 0
    """Seed of what is random in them."""

    def __post_init__(self) -> None:
        names = tuple(name for entry in self.control_kinds for name in entry.split(",") if name)
        object.__setattr__(self, "control_kinds", names)
        for name in names:
            if name not in CONTROLS:
                raise UserError(f"unknown control {name!r}: {near_matches(name, CONTROLS)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The controls to measure."""
        return self.control_kinds or (tuple(CONTROLS) if self.controls else ())


class Control(NamedTuple):
    """One control: its SAE, and the cache and the model that it belongs to."""

    sae: SAE
    cache: ActivationCache
    model: Any


def measure_controls(
    sae: SAE,
    cache: ActivationCache,
    l0: float,
    config: EvaluateConfig,
    tasks: TaskConfig,
    controls: ControlConfig,
    *,
    model: Any = None,
    random_model: Callable[[], Any] | None = None,
    folder: Path | None = None,
    progress: Report | None = None,
) -> dict[str, dict[str, Any]]:
    """For each control ``{"what", "metrics", "tasks"}``, or ``{"what", "cannot"}`` with the reason, ready for JSON.

    ``l0`` is the SAE's, measured. ``model`` is the language model of the cache, for cross-entropy; ``random_model``
    gives the one with random weights. ``folder`` is that of the run: it says how to train the controls that are
    trained, and keeps them in ``controls/``.
    """
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        made: dict[str, Control] = {}
        for name in controls.kinds:
            found[name] = {"what": CONTROLS[name]}
            try:
                made[name] = _make(
                    name, sae, cache, l0, controls.control_seed, model, random_model, folder, progress, stack
                )
            except UserError as error:
                found[name]["cannot"] = str(error)
        shared: dict[str, Any] = {}
        for name, control in made.items():
            own = evaluate(control.sae, control.cache, None, replace(config, lm_tokens=0))
            found[name]["metrics"] = {key: e.row() for key, e in own.metrics.items() if not key.startswith("legacy")}
            found[name]["tasks"] = _tasks(control, tasks, config, shared)
            if progress is not None:
                progress("controls", list(made).index(name) + 1, len(made))
        same = {name: control.sae for name, control in made.items() if control.cache is cache}
        if same and model is not None and config.lm_tokens:
            run = spliced(same, cache, model, config, progress)
            for name in same:
                estimates = run.sums[name].estimates(seed=config.seed)
                found[name]["metrics"] |= {key: e.row() for key, e in estimates.items()}
    return found


def _make(
    name: str,
    sae: SAE,
    cache: ActivationCache,
    l0: float,
    seed: int,
    model: Any,
    random_model: Callable[[], Any] | None,
    folder: Path | None,
    progress: Report | None,
    stack: ExitStack,
) -> Control:
    if sae.transcodes and name in ("random_directions", "raw_channels", "random_transformer"):
        raise UserError("a transcoder writes elsewhere than it reads, so this control is not one of it")
    if isinstance(sae, Normalised) and name in ("untrained", "frozen_dictionary", "random_transformer"):
        raise UserError(f"an SAE that reads normalised activations ({sae.normalize}) cannot be trained here")
    if name == "untrained":
        return Control(untrained(sae, cache, seed), cache, model)
    if name == "random_directions":
        return Control(random_directions(sae, cache, l0, seed), cache, model)
    if name == "raw_channels":
        return Control(raw_channels(sae, cache, l0), cache, model)
    how = replace(recipe(folder), seed=seed)
    place = Path(folder or "") / FOLDER / name
    if name == "frozen_dictionary":
        return Control(frozen_dictionary(sae, cache, place, how, progress), cache, model)
    if random_model is None:
        raise UserError("the language model is not known; give it with --model")
    other = random_model()
    trained, own = random_transformer(sae, cache, other, place, how, progress)
    stack.callback(shutil.rmtree, own.path, ignore_errors=True)
    return Control(trained, own, other)


def _tasks(control: Control, tasks: TaskConfig, config: EvaluateConfig, shared: dict[str, Any]) -> dict[str, Any]:
    """Each task's result, or why there is none: a model with random weights may not spell."""
    found: dict[str, Any] = {}
    for name in tasks.tasks:
        own = replace(tasks, tasks=(name,), labels=tasks.labels if name in ("probing", "scr", "tpp") else None)
        try:
            options: dict[str, Any] = {"seed": config.seed, "any_weights": config.any_weights, "shared": shared}
            found |= run_tasks(control.sae, control.cache, own, control.model, **options)
        except UserError as error:
            found[name] = {"cannot": str(error)}
    return found

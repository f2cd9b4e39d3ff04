"""The commands that reproduce a run and its numbers, built from what its files record."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Mapping
from typing import Any

from saelab.evaluation import EvaluateConfig
from saelab.features import IndexConfig
from saelab.runs import Run
from saelab.sae import VARIANTS
from saelab.sae.base import current
from saelab.training import TrainConfig
from saelab.training.fitting import ROLLED, SOURCE, without_warmups

CACHE, MODEL, RUN = "CACHE", "MODEL", "RUN"  # placeholders where none is recorded


def train_command(run: Run) -> str | None:
    """The command that trained the run; None for an SAE of another tool. Resolved defaults are included."""
    own = run.metadata.get("saelab") or {}
    if run.is_foreign or own.get("variant") not in VARIANTS:
        return None
    variant, options = current(own["variant"], own.get("config") or {})
    train, warmups = without_warmups(run.metadata.get("train") or {})
    known = inspect.signature(VARIANTS[variant]).parameters
    config = {name: value for name, value in {**options, **warmups}.items() if name in known and name != "d_in"}
    kept = {name: value for name, value in config.items() if name in {"d_sae", "k"} or _differs(value, known[name])}
    kept |= _changed(TrainConfig, train)
    if source := run.metadata.get(SOURCE):
        kept = {"from": source} | kept
    if "d_out" in config:  # of a transcoder
        kept = {"target": run.metadata.get("target_cache") or CACHE} | kept
        if config["d_out"] == options.get("d_in"):
            del kept["d_out"]
    if rolled := run.metadata.get(ROLLED):
        kept.pop("epochs", None)  # which is no option there
        return _spell("train", None, _stream(run, rolled) | {"variant": variant, **kept, "out": run.name})
    cache = run.metadata.get("cache") or CACHE
    return _spell("train", cache, {"variant": variant, **kept, "out": run.name})


def _stream(run: Run, rolled: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which a run harvested while it trained."""
    options = {"tokens": rolled["tokens"], **rolled["options"]}
    hidden = {"gradients", "held_out", "pass_tokens"}  # the first two are no options, the third depends on the device
    return {
        "model": run.model_name or MODEL,
        "hook": run.hook_name,
        "text": rolled["text"].split(" + "),
        **{name: value for name, value in options.items() if name not in hidden},
    }


def evaluate_command(run: Run) -> str:
    """The command that makes ``evaluation.json``."""
    settings = run.evaluation.get("settings") or {}
    cache = settings.get("cache") or run.metadata.get("cache") or CACHE
    target = settings.get("target") or run.metadata.get("target_cache")
    places = {"cache": cache, **({"target": target} if target else {})}
    return _spell("evaluate", run.name, places | _changed(EvaluateConfig, settings))


def index_command(run_name: str, meta: Mapping[str, Any]) -> str:
    """The command that made a feature index, from its ``meta``."""
    return _spell("index", run_name, {"cache": meta["cache"], **_changed(IndexConfig, meta["config"])})


def steer_eval_command(result: Mapping[str, Any], folder: str) -> str:
    """The command that made an evaluation of steering, from its ``steer_eval.json``.

    Placeholders stand for what that does not say: where the judge is, and the recipe.
    """
    from saelab.steering.evaluation.config import SteerEvalConfig  # a page loads it when it needs it

    config = result.get("config") or {}
    options: dict[str, Any] = {"out": folder, **_changed(SteerEvalConfig, config)}
    if "recipe" in config.get("methods", ()):
        options["recipe"] = "RECIPE"
    if result.get("judge"):
        options |= {"endpoint": "ADDRESS", "judge": result["judge"]}
    command = _spell("steer-eval", result.get("sae") or RUN, options)
    return " ".join([command, *(f"--concept {shlex.quote(name)}" for name in result.get("classifiers") or ())])


def _differs(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether a value read from JSON is not the parameter's default."""
    return value != _as_json(parameter.default)


def _as_json(value: Any) -> Any:
    """There, sequences are lists."""
    return list(value) if isinstance(value, tuple) else value


def _changed(config: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values that are options and not their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: values[name] for name in defaults if name in values and values[name] != _as_json(defaults[name])}


def _spell(command: str, subject: str | None, options: Mapping[str, Any]) -> str:
    words = ["saelab", command, *([] if subject is None else [shlex.quote(subject)])]
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            parts = value if isinstance(value, list | tuple) else [value]
            words += [f"--{option}", *(shlex.quote(str(part)) for part in parts)]
    return " ".join(words)

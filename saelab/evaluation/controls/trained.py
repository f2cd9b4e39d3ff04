"""Controls that are trained as the SAE was: with a frozen dictionary, and on a transformer with random weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation.controls.dictionaries import seeded
from saelab.harvesting import harvest_again
from saelab.layout import RUN
from saelab.sae import SAE
from saelab.sae.weights import load_sae
from saelab.training import TrainConfig, finished, fit_steps, read_run
from saelab.training.fitting import ROLLED, VALIDATION

Report = Callable[[str, int, int], None]  # what, done, total


def recipe(folder: Path | None) -> TrainConfig:
    """How the run in ``folder`` was trained. UserError for an SAE whose files do not say."""
    run = None if folder is None else read_run(folder)
    if run is None:
        raise UserError(f"{folder or 'the SAE'} has no {RUN}, so it is not known how to train a control like it")
    if ROLLED in run:
        raise UserError(
            f"{folder} was trained while its {run[ROLLED]['tokens']:,} activations were harvested, which are not kept: "
            "a control cannot be trained on them; train on a cache to have one"
        )
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in run["train"].items() if name in known})


def frozen_dictionary(
    sae: SAE, cache: ActivationCache, folder: Path, config: TrainConfig, progress: Report | None = None
) -> SAE:
    """The SAE trained again with its dictionary frozen at random directions (Korznikov et al., 2026, arXiv 2602.14111,
    "Frozen Decoder"): same options, rate, data and steps. It is kept in ``folder``, and read from there if it is
    finished."""
    return _trained(sae, cache, folder, replace(config, freeze="decoder"), "frozen dictionary", progress)


def random_transformer(
    sae: SAE,
    cache: ActivationCache,
    model: Any,
    folder: Path,
    config: TrainConfig,
    progress: Report | None = None,
) -> tuple[SAE, ActivationCache]:
    """An SAE trained in the same way on the same tokens through ``model``, whose weights are random, and its cache.

    The SAE is kept in ``folder``; the cache lies beside it, is as large as ``cache``, and is the caller's to delete.
    """
    place = folder.with_name(f"{folder.name}-cache")
    made = harvest_again(
        model, cache, place, overwrite=True, progress=None if progress is None else _named(progress, "random model")
    )
    try:
        return _trained(sae, made, folder, config, "SAE of the random model", progress), made
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _trained(
    sae: SAE, cache: ActivationCache, folder: Path, config: TrainConfig, what: str, progress: Report | None
) -> SAE:
    fresh = seeded(sae, config.seed)
    if finished(folder) and _is_same(folder, fresh, cache, config):
        return load_sae(folder).to(sae.device)
    shutil.rmtree(folder, ignore_errors=True)
    total = None
    for step in fit_steps(fresh, cache, config, folder):
        if progress is not None:
            total = total or int((read_run(folder) or {}).get("steps", step.step))
            progress(what, step.step, total)
    return fresh.eval()


def _is_same(folder: Path, sae: SAE, cache: ActivationCache, config: TrainConfig) -> bool:
    """Whether the finished run in ``folder`` is the control that would be trained now."""
    run, target = read_run(folder) or {}, None if cache.target is None else cache.target.fingerprint
    same = run.get("variant") == sae.variant and run.get("config") == sae.config
    same = same and run.get("cache_fingerprint") == cache.fingerprint and run.get("target_fingerprint") == target
    wanted = {name: value for name, value in asdict(config).items() if name != "precision"}  # which auto decides
    return same and VALIDATION not in run and all(run["train"].get(name) == value for name, value in wanted.items())


def _named(progress: Report, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)

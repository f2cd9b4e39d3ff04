"""A run folder: training with checkpoints and metrics on disk, to be killed and resumed at any moment."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab import checkpoint
from saelab.data.cache import ActivationCache, Batch
from saelab.errors import UserError
from saelab.sae import SAE
from saelab.train.config import TrainConfig, check, n_steps
from saelab.train.log import JsonLines, Log
from saelab.train.loop import StepMetrics, start, train
from saelab.train.state import TrainState

RUN = "run.json"


def fit(
    sae: SAE,
    cache: ActivationCache,
    config: TrainConfig | None,
    folder: Path | str,
    *,
    resume: bool = False,
    checkpoint_steps: int = 500,
    logs: Sequence[Log] = (),
    metadata: Mapping[str, Any] | None = None,
    stream: Iterable[Batch] | None = None,
    centre: Tensor | None = None,
) -> Generator[StepMetrics]:
    """Train ``sae`` into a run folder; yields after every step, like :func:`saelab.train.train`.

    The folder gets ``run.json`` (what is being trained) at once, ``metrics.jsonl`` line by line, a checkpoint every
    ``checkpoint_steps`` steps, and at the end the folded SAE in place of the checkpoints. Closing the generator
    early saves a checkpoint.

    Guarantee: kill the process at any moment and call again with ``resume=True`` (``sae`` built as before), and
    weights, ``metrics.jsonl`` and data order come out bit-identical to those of a run that was never interrupted,
    on the same machine with the same number of threads. With ``stream`` the caller hands in the batches, starting
    after the step of the last checkpoint, and vouches for the cache; ``centre`` is that of
    :func:`saelab.train.start`. Raises UserError if the configuration or the cache changed.
    """
    folder = Path(folder)
    check(sae, cache, config := (config or TrainConfig()).resolved(sae, cache))
    about = describe(sae, cache, config)
    metadata = {**about, **(metadata or {})}
    if finished(folder):
        raise UserError(f"{folder} holds a finished run; train into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if resume and stream is None:
        cache.verify()  # the fingerprint vouches for the manifest, this for the activations
    state = _restore(sae, about, folder) if resume else None
    if not resume:
        checkpoint.remove_steps(folder)
    checkpoint.write_json(folder / RUN, about)
    total = n_steps(cache, config)
    with ExitStack() as stack:
        logs = [stack.enter_context(closing(JsonLines(folder, state.step if state else 0))), *logs]
        state = state or start(sae, cache, config, centre)
        loop = stack.enter_context(closing(train(sae, cache, config, state, stream)))
        for metrics in loop:
            for log in logs:
                log.write(metrics.row())
            if metrics.step % checkpoint_steps == 0 and metrics.step < total:
                save(folder, sae, state, metadata)
            try:
                yield metrics
            except GeneratorExit:
                save(folder, sae, state, metadata)
                raise
    checkpoint.save_sae(sae, folder, metadata)
    checkpoint.remove_steps(folder)


def describe(sae: SAE, cache: ActivationCache, config: TrainConfig) -> dict[str, Any]:
    """What a run is: the SAE, the training configuration, the data. Kept in ``run.json`` and as provenance."""
    manifest = cache.manifest
    return {
        "variant": sae.variant,
        "config": sae.config,
        "train": asdict(config),
        "steps": n_steps(cache, config),
        "model_name": manifest.model,
        "hook_name": manifest.hook_name,
        "hf_hook_name": manifest.hf_hook_name,
        "context_size": manifest.context_length,
        "prepend_bos": manifest.bos != "none",
        "dataset_path": manifest.text,
        "cache": str(cache.path),
        "cache_fingerprint": cache.fingerprint,
    }


def finished(folder: Path | str) -> bool:
    """Whether a run folder holds a trained SAE: its configuration is the last thing a run writes."""
    return (Path(folder) / checkpoint.CONFIG).is_file()


def read_run(folder: Path | str) -> dict[str, Any] | None:
    """What :func:`describe` said of the run in a folder, or None if none was begun there."""
    path = Path(folder) / RUN
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); start the run again with --overwrite") from error


def save(folder: Path, sae: SAE, state: TrainState, metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint of a run between two steps."""
    state.fold(sae)
    checkpoint.save_step(folder, state.step, sae, state.tensors(sae), state.scalars(), metadata)
    state.unfold(sae)


def _restore(sae: SAE, about: dict[str, Any], folder: Path) -> TrainState | None:
    """Put the last checkpoint's weights into ``sae``; None if the run was killed before its first one."""
    before = read_run(folder)
    if before is None:
        return None
    _same(before, about, folder)
    path = checkpoint.latest_step(folder)
    if path is None:
        return None
    weights, tensors, scalars = checkpoint.load_step(path, sae)
    sae.load_state_dict(weights)
    return TrainState.restore(sae, tensors, scalars)


def _same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    if before["cache_fingerprint"] != now["cache_fingerprint"]:
        raise UserError(
            f"the cache {now['cache']} is not the one {folder} was trained on (fingerprint {now['cache_fingerprint']}, "
            f"was {before['cache_fingerprint']}); restore it or start a new run"
        )
    if before["variant"] != now["variant"]:
        raise UserError(f"{folder} trains a {before['variant']} SAE, not {now['variant']}; start a new run")
    for part in ("config", "train"):
        for name, value in json.loads(json.dumps(now[part])).items():
            if before[part].get(name) != value:
                raise UserError(
                    f"{name}={value} differs from {name}={before[part].get(name)} of the run in {folder}; "
                    "resume with the same settings or start a new run"
                )

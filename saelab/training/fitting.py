"""Train into a run folder, with checkpoints and metrics on disk; a run may be killed and resumed at any moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.data.cache import ActivationCache, Batch
from saelab.distributed import SINGLE, Parallel
from saelab.distributed.failures import LostProcess, is_lost, naming_lost
from saelab.distributed.sharding import whole as whole_of
from saelab.errors import UserError, damaged
from saelab.files import lock, remove_partial, write_json
from saelab.layout import CHECKPOINTS, CONFIG, RUN
from saelab.lm.record import ModelRecord
from saelab.sae import SAE, VARIANTS
from saelab.sae.base import current
from saelab.sae.options import defaults as option_defaults
from saelab.training.checkpoints import Interval, Store, latest_step, remove_steps
from saelab.training.config import TrainConfig, n_steps, prepared
from saelab.training.divergence import DOUBTFUL, Diverged
from saelab.training.log import JsonLines, Log
from saelab.training.loop import adopt, run_steps, start, train_steps
from saelab.training.memory import check_memory
from saelab.training.readings import READ_EVERY, StepMetrics
from saelab.training.remote import carrier_of, run_folder
from saelab.training.state import TrainState

SOURCE = "fine_tuned_from"  # key of the SAE that the run is fine-tuned from
ROLLED = "rolled"  # key of how the training rows were streamed, where they were
VALIDATION = "validation_rows"  # key of the span of training rows that the run leaves out, if it does


def train(
    sae: SAE,
    cache: ActivationCache,
    config: TrainConfig | None = None,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float = 10.0,
    source: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[StepMetrics], object] | None = None,
) -> StepMetrics | None:
    """Train ``sae`` in place on the training split of ``cache``, to the end; returns the last step's metrics.

    With ``out`` the run also fills that folder, or the one behind a URL (see :mod:`saelab.training.remote`), from which
    it can be resumed after a kill (``resume=True``, ``sae`` built as before). With ``source``, the name of a trained
    SAE whose weights ``sae`` has, these are fine-tuned. ``progress`` is called after every step. The result is None
    only where a resumed run has no step left. :func:`train_steps` and :func:`fit_steps` are generators that do the
    same, for a loop of your own. Raises UserError,
    before anything is computed, where the run cannot work, and :class:`saelab.training.Diverged` where the loss is not
    finite.
    """
    if out is None and resume:
        raise UserError("resume=True needs the folder of the run; give out")
    last = None
    with run_folder(out, resume=resume) as folder:
        if folder is not None:
            more: dict[str, Any] = {"source": source, "metadata": metadata, "logs": carrier_of(folder)}
            often: dict[str, Any] = {"checkpoint_steps": checkpoint_steps, "checkpoint_minutes": checkpoint_minutes}
            steps = fit_steps(sae, cache, config, folder, resume=resume, **often, **more)
        else:
            config = prepared(sae, cache, config, fine_tuning=source is not None)
            steps = train_steps(sae, cache, config, None if source is None else adopt(sae, cache))
        for last in steps:
            if progress is not None:
                progress(last)
    return last


def fit_steps(
    sae: SAE,
    cache: ActivationCache,
    config: TrainConfig | None,
    folder: Path | str,
    *,
    resume: bool = False,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float = 10.0,
    logs: Sequence[Log] = (),
    metadata: Mapping[str, Any] | None = None,
    stream: Iterable[Batch] | None = None,
    centre: Tensor | None = None,
    source: str | None = None,
    parallel: Parallel = SINGLE,
) -> Generator[StepMetrics]:
    """Train ``sae`` into a run folder, one step each time the generator is advanced (see :func:`train_steps`).

    The folder gets ``run.json`` (what is being trained) at once, ``metrics.jsonl`` line by line, a checkpoint every
    ``checkpoint_minutes``, or every ``checkpoint_steps`` steps where that is given, and at the end the folded SAE in
    place of the checkpoints. A checkpoint is copied between two steps (which takes the memory of the weights, three
    times, on the CPU) and written by a thread; if that fails, the next step raises. Closing the generator early saves a
    checkpoint.

    Guarantee: kill the process at any moment and call again with ``resume=True`` (``sae`` built as before), and
    weights, ``metrics.jsonl`` and data order come out bit-identical to those of a run that was never interrupted, on
    the same machine with the same number of threads. With ``stream`` the caller supplies the batches, starting after
    the step of the last checkpoint, and must ensure that the cache is unchanged; ``centre [d_in]`` is that of
    :func:`saelab.training.start`. With ``source``, the name of a trained SAE whose weights ``sae`` has, these are
    fine-tuned (see :func:`saelab.training.adopt`); they become the first checkpoint, so a resumed run takes any SAE of
    the same kind. With ``parallel`` all processes call this, each with its shard of the SAE, and the run may be resumed
    with another number of them; one that loses another raises :class:`saelab.distributed.failures.LostProcess`. Raises
    UserError if the configuration or the cache changed, or another process is writing the folder.
    """
    whole = whole_of(sae, parallel)
    config = prepared(whole, cache, config, parallel, fine_tuning=source is not None).on(sae.device)
    about = run_description(whole, cache, config, source)
    store = Store(Path(folder), sae, whole, {**about, **(metadata or {})}, parallel)
    interval = Interval(checkpoint_steps, checkpoint_minutes)
    return _fit(store, cache, config, about, resume, interval, logs, stream, centre)


def _fit(
    store: Store,
    cache: ActivationCache,
    config: TrainConfig,
    about: dict[str, Any],
    resume: bool,
    interval: Interval,
    logs: Sequence[Log],
    stream: Iterable[Batch] | None,
    centre: Tensor | None,
) -> Generator[StepMetrics]:
    sae, folder, parallel, total = store.sae, store.folder, store.parallel, n_steps(cache, config)
    if finished(folder):
        raise UserError(f"{folder} holds a finished run; train into another folder")
    _check_equal(parallel, about)
    with lock(folder) if parallel.is_main else nullcontext():
        if parallel.data_size > 1:  # before they divide what is resumed
            check_memory(sae, config, data_ranks=parallel.data_size)
        state = _resume(store, cache, about, verify=stream is None) if resume else None
        if parallel.is_main:
            remove_partial(folder)
            if state is None:
                remove_steps(folder)
        parallel.barrier()
        if parallel.data_size == 1:
            check_memory(sae, config, resumed=state is not None)
        if state is None:
            state = _adopt(store, cache) if SOURCE in about else start(sae, cache, config, centre)
        if parallel.is_main:
            write_json(folder / RUN, about)
        parallel.barrier()
        with ExitStack() as stack:
            stack.callback(store.writer.finish)
            if parallel.is_main:
                logs = [stack.enter_context(closing(JsonLines(folder, state.step))), *logs]
            loop = stack.enter_context(closing(run_steps(sae, cache, config, state, stream, parallel)))
            try:
                with naming_lost():
                    yield from _logged(loop, store, state, interval, total, logs)
            except LostProcess:
                store.writer.abandon()
                raise
            except Diverged as error:
                store.writer.wait()
                raise Diverged(f"{error}; {_kept(folder)}") from error
        store.save_final()


def _check_equal(parallel: Parallel, about: dict[str, Any]) -> None:
    """Refuse processes that would train different SAEs, or on different data; every process calls it."""
    data = [about["cache_fingerprint"], about.get("target_fingerprint")]
    parallel.check_equal("the cache", json.dumps(data), "give every process the same files")
    places = {"cache", "target_cache"}  # which machines may call by other names
    rest = {name: value for name, value in about.items() if name not in places}
    parallel.check_equal("the run's configuration", json.dumps(rest), "start every process with the same options")


def _logged(
    loop: Iterable[StepMetrics],
    store: Store,
    state: TrainState,
    interval: Interval,
    total: int,
    logs: Sequence[Log],
) -> Generator[StepMetrics]:
    """The steps of ``loop``, with a line in every log, and checkpoints on the way and where the caller stops."""
    due, waiting = interval.clock(store.parallel), []
    for metrics in loop:
        store.writer.check()
        waiting.append(metrics)
        saves = due(metrics.step) and metrics.step < total
        if metrics.known or saves or len(waiting) == READ_EVERY or metrics.step == total:
            _write(waiting, logs)
        # A checkpoint replaces the one before, which is better where the error is about to explode.
        if saves and state.excess <= DOUBTFUL:
            store.save_step(state, wait=False)
        try:
            yield metrics
        except GeneratorExit:
            _write(waiting, logs)
            if not is_lost():
                store.save_step(state)
            raise


def _write(waiting: list[StepMetrics], logs: Sequence[Log]) -> None:
    """Read the numbers of the steps that wait for it, and log them, those before a failure also where one failed."""
    try:
        if waiting:
            waiting[-1].read()
    finally:
        for metrics in waiting:
            for log in logs if metrics.known else ():
                log.write(metrics.row())
        waiting.clear()


def _kept(folder: Path) -> str:
    """Where a run that diverged can be taken up, for its message."""
    path = latest_step(folder)
    if path is None:
        return "there is no checkpoint from before"
    return f"{CHECKPOINTS}/{path.name} in the run folder is from before: go on from it with --from and a lower lr"


def run_description(sae: SAE, cache: ActivationCache, config: TrainConfig, source: str | None = None) -> dict[str, Any]:
    """The description of a run, for ``run.json`` and the provenance: the SAE, the training configuration, the data."""
    manifest = cache.manifest
    return {
        **({} if source is None else {SOURCE: source}),
        "variant": sae.variant,
        "config": sae.config,
        "train": asdict(config),
        "steps": n_steps(cache, config),
        "model_name": manifest.model,
        "language_model": ModelRecord.from_manifest(manifest).to_json(),
        "hook_name": manifest.hook_name,
        "hf_hook_name": manifest.hf_hook_name,
        "context_size": manifest.context_length,
        "prepend_bos": manifest.bos != "none",
        # Positions at the start of a text that it is not trained on: the BOS token of a document has no row either.
        "skip_first": max(manifest.skip_first, int(manifest.bos == "document")),
        "dataset_path": manifest.text,
        "rms_norm": manifest.rms_norm,  # the unit of steering strengths
        "cache": str(cache.path),
        "cache_fingerprint": cache.fingerprint,
        **_target(cache),
        **({} if cache.rolled is None else {ROLLED: cache.rolled}),
        **({VALIDATION: list(cache.split_rows("validation"))} if cache.n_split("validation") else {}),
    }


def _target(cache: ActivationCache) -> dict[str, Any]:
    """What the description of a transcoder's run says of its target."""
    if cache.target is None:
        return {}
    manifest = cache.target.manifest
    return {
        "hook_name_out": manifest.hook_name,
        "hf_hook_name_out": manifest.hf_hook_name,
        "rms_norm": manifest.rms_norm,  # of what it writes, the unit of steering strengths
        "rms_norm_in": cache.manifest.rms_norm,
        "target_cache": str(cache.target.path),
        "target_fingerprint": cache.target.fingerprint,
    }


def _adopt(store: Store, cache: ActivationCache) -> TrainState:
    """The first state of a fine-tuning run, saved as a checkpoint before any other file of the run."""
    state = adopt(store.sae, cache)
    state.unfold(store.sae)  # checkpoints are saved between steps, in units of the scaled data
    store.save_step(state)
    state.fold(store.sae)
    return state


def finished(folder: Path | str) -> bool:
    """Whether a run folder holds a trained SAE: its configuration is the last thing a run writes."""
    return (Path(folder) / CONFIG).is_file()


def read_run(folder: Path | str) -> dict[str, Any] | None:
    """The :func:`run_description` stored in a run folder, or None if no run was begun there."""
    path = Path(folder) / RUN
    if not path.is_file():
        return None
    with damaged(path, "start the run again with --overwrite"):
        content = json.loads(path.read_bytes())
        for name, kind in (("variant", str), ("config", dict), ("train", dict), ("cache_fingerprint", str)):
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is {content[name]!r}")
        content["variant"], content["config"] = current(content["variant"], content["config"])
        content["train"], moved = without_warmups(content["train"])
        content["config"] |= moved
        return content


def without_warmups(train: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training options of 0.1.0 in two parts: those of this release, and the warm-ups, now options of the variants."""
    warmups = {name: train[name] for name in ("k_start", "k_warmup", "beta_warmup") if train.get(name)}
    if "k_warmup" not in warmups:
        warmups.pop("k_start", None)
    rest = {name: value for name, value in train.items() if name not in {"k_start", "k_warmup", "beta_warmup"}}
    return rest, warmups


def _resume(store: Store, cache: ActivationCache, about: dict[str, Any], verify: bool) -> TrainState | None:
    """Put the last checkpoint's weights into the SAE; None if the run was killed before its first one."""
    before = read_run(store.folder)
    if before is None:
        return None
    _same(before, about, store.folder)
    # A store checks its own bytes, and reading all of them may cost much.
    if verify and cache.folder.local is not None and store.parallel.is_main:
        cache.verify()  # the fingerprint covers the manifest, this covers the activations
    store.parallel.barrier()
    state = store.restore()
    if state is None and SOURCE in about:
        raise UserError(f"{store.folder} has lost its initial weights; start the run again with --overwrite")
    return state


def _same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    if before["cache_fingerprint"] != now["cache_fingerprint"]:
        raise UserError(
            f"the cache {now['cache']} is not the one {folder} was trained on (fingerprint {now['cache_fingerprint']}, "
            f"was {before['cache_fingerprint']}); restore it or start a new run"
        )
    if before.get("target_fingerprint") != now.get("target_fingerprint"):
        raise UserError(
            f"{folder} was begun with {before.get('target_cache', 'no target')} as its target, not "
            f"{now.get('target_cache', 'without one')}; resume it so or start a new run"
        )
    for name, value in now.get(ROLLED, {}).items():
        if name != "options" and (was := before.get(ROLLED, {}).get(name)) != value:
            raise UserError(f"{name}={value} differs from {name}={was} of the run in {folder}; start a new run")
    if before.get(VALIDATION) != now.get(VALIDATION):
        raise UserError(
            f"{folder} was begun by a sweep that tunes and does not train on its validation rows; resume the sweep"
        )
    if before["variant"] != now["variant"]:
        raise UserError(f"{folder} trains a {before['variant']} SAE, not {now['variant']}; start a new run")
    origins = [run.get(SOURCE, "random weights") for run in (before, now)]
    if origins[0] != origins[1]:
        raise UserError(f"{folder} was begun from {origins[0]}, not from {origins[1]}; resume it so or start a new run")
    for part, known in (("config", option_defaults(VARIANTS[now["variant"]])), ("train", asdict(TrainConfig()))):
        # A setting that one of them leaves out has its default.
        was, wanted = (json.loads(json.dumps({**known, **run[part]})) for run in (before, now))
        for name, value in wanted.items():
            if name == "precision" and "auto" in (value, was.get(name)):
                continue  # it stands for the arithmetic of the device at hand
            if was.get(name) != value:
                raise UserError(
                    f"{name}={value} differs from {name}={was.get(name)} of the run in {folder}; "
                    "resume with the same settings or start a new run"
                )

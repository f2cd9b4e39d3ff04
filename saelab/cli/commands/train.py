"""``saelab train``: train one SAE of any variant, with the variant's own options, on a cache or while harvesting."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from saelab import kernels
from saelab.cli import report
from saelab.cli.console import console, out, output_folder, parse, part, print_json, progress_bar, quiet
from saelab.cli.fine_tuning import announce, check_options, fixed_options, open_start
from saelab.cli.opening import open_pair
from saelab.cli.placement import computing_device
from saelab.cli.signals import Stop, stop_on_signals
from saelab.cli.streaming import bases, check_asked, is_asked, stream_cache, streamed_steps
from saelab.cli.variants import l0_field, option_fields, resolve_l0, value_of, variant_in
from saelab.data.cache import ActivationCache
from saelab.distributed import SINGLE, Parallel, Poll, launched, start_world
from saelab.distributed.checkpoint import slices, split_dims
from saelab.distributed.failures import naming_lost, restarted
from saelab.distributed.sharding import build_shard
from saelab.distributed.sharding import whole as whole_of
from saelab.distributed.world import end_world
from saelab.errors import Stopped, UserError, damaged
from saelab.files import url_of
from saelab.interop.fetch import full_name
from saelab.layout import RUN
from saelab.runs import Run
from saelab.sae import SAE, VARIANTS
from saelab.training import StepMetrics, TrainConfig, chosen_rate, finished, fit_steps, n_steps, prepared, read_run
from saelab.training.checkpoints import Interval, latest_step, number_of
from saelab.training.config import target_width
from saelab.training.divergence import failure
from saelab.training.fitting import ROLLED, SOURCE
from saelab.training.log import Log, TensorBoard, Wandb, recent_fvu
from saelab.training.remote import carrier_of, run_folder, shared_folder


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """Where to write, and which SAE."""

    out: Path
    """Run folder to write, or a URL: the run is then trained in a local copy, and each checkpoint is carried there."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Fine-tune this SAE: a run, or a file, a folder or a hub id of any tool. Its variant, its size and the options
    that its codes depend on are taken over; options that contradict them are refused."""
    variant: str = "topk"
    """The variant; `--variant NAME --help` lists its own options too."""
    d_sae: int = 4608
    """Latents."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    dict_ranks: int = 1
    """Processes that share one copy of the dictionary, each holding d-sae / dict-ranks latents; the others divide
    every batch. Start several with `torchrun --nproc-per-node 4 -m saelab train ...`."""
    timeout_s: float = 60.0
    """Seconds that a process waits for another one before it ends the run."""
    checkpoint_timeout_s: float = 3600.0
    """The same while a checkpoint is written or read."""
    resume: bool = False
    """Continue the run in the folder, if there is one, with its settings; the result is bit-identical to that of an
    uninterrupted run. Processes that `torchrun --max-restarts` starts again do so in any case."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, which are written while the training goes on; SIGINT and SIGTERM save one and
    stop."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints, in place of minutes."""
    overwrite: bool = False
    """Replace an existing run folder."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    wandb: str | None = None
    """Also log to this wandb project."""
    json: bool = False
    """Print the final metrics as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class Options(OwnOptions):
    """Where to read, where to write, and which SAE."""

    cache: tyro.conf.Positional[Path] = tyro.MISSING
    """Folder or URL of the activation cache. To harvest while training instead, give --tokens and --text:
    `saelab train --tokens N --help` lists their options."""
    target: Path | None = None
    """Train a transcoder: folder of the cache of what the SAE shall reconstruct, another place of the model, harvested
    in the same pass (`saelab harvest --hook INPUT TARGET`)."""
    d_out: int | None = None
    """Width of the target; to be given where it is not that of the input."""
    buffer_gb: float = 8.0
    """Of a cache behind a URL: gigabytes of local disk for what was fetched, so that later epochs need not fetch it."""


def main(args: Sequence[str]) -> None:
    """Parse, train with a progress bar, save the run folder; one behind a URL through its local copy."""
    out = value_of(args, "--out")
    if out is None or url_of(out) is None or {"-h", "--help"} & set(args):
        train(args)
        return
    if is_asked(args):
        check_asked(args, 0)
        if value_of(args, "--cache-folder") is None:
            raise UserError(f"the rolling cache of {out} needs a local folder; name one with --cache-folder")
    folder_of = shared_folder if launched() else run_folder
    with folder_of(out, resume="--resume" in args, overwrite="--overwrite" in args) as folder:
        train([arg.replace(out, str(folder)) if arg in (out, f"--out={out}") else arg for arg in args])
    console.print(f"carried to {out}", markup=False, soft_wrap=True)


def train(args: Sequence[str]) -> None:
    """Parse and train."""
    folder = value_of(args, "--out")
    saved = read_run(folder) if "--resume" in args and folder is not None else None
    name, source = value_of(args, "--from"), None
    if name is not None and saved is None:  # a run that has begun keeps the weights it began with
        source = open_start(name, value_of(args, "--variant"))
    variant = source.sae.variant if source else variant_in(args, default=saved["variant"] if saved else "topk")
    # The training options come after ours in the list of fields, so they are the first base.
    own = [*option_fields(variant), *l0_field(variant)]
    streams = is_asked(args)
    if value_of(args, "--lr") == "tune":
        raise UserError('lr = "tune" compares rates in a sweep (docs/how-to/sweep.md); give a number here, or auto')
    if streams:
        check_asked(args, 0)
    if saved and ROLLED in saved and not streams:
        raise UserError(
            f"{folder} is trained while its activations are harvested; repeat its whole command with --resume"
        )
    if streams:
        more, harvests = bases()
        epochs: Any = ("epochs", tyro.conf.Suppress[int], dataclasses.field(default=1))
        own, parts = [*own, *more, epochs], (TrainConfig, *harvests, OwnOptions)
    else:
        parts = (TrainConfig, Options)
    cls = dataclasses.make_dataclass("TrainOptions", own, bases=parts, frozen=True)
    default, positional = None, {} if streams else {"cache": tyro.MISSING}
    if saved:
        same_variant = saved["config"] if variant == saved["variant"] else {}
        known = {key: value for key, value in same_variant.items() if key != "d_in"}
        with damaged(f"{folder}/{RUN}", "start the run again with --overwrite"):
            known = {**known, **saved["train"], "variant": variant, "from_": saved.get(SOURCE)}
            if "target_cache" in saved:
                known["target"] = Path(saved["target_cache"])
            default = cls(**positional, out=tyro.MISSING, **known)
    elif source:
        default = cls(**positional, out=tyro.MISSING, **fixed_options(source))
    options = parse(cls, "train", args, f"Train a {variant} SAE: {VARIANTS[variant].__doc__}", default)
    options = resolve_l0(options, variant, args)
    if source:
        check_options(source, options, default)
    if saved and finished(options.out):
        check_finished(options, default, saved)
    run(options, {name: getattr(options, name) for name, *_ in option_fields(variant)}, source)


def check_finished(options: Any, saved_options: Any, saved: dict[str, Any]) -> None:
    """UserError where a finished run has other settings than those that were given with --resume."""
    for name in ("variant", *saved["config"], *saved["train"]):
        given = getattr(options, name, None)
        was = saved["variant"] if name == "variant" else getattr(saved_options, name, None)
        if given not in (None, "auto", was):
            raise UserError(
                f"{name}={given} differs from {name}={was} of the finished run in {options.out}; choose another folder"
            )


def run(options: Any, config: dict[str, Any], source: Run | None = None) -> StepMetrics | None:
    """Train as the options say, from ``source`` or from scratch; returns the last step's metrics."""
    if restarted():
        options = dataclasses.replace(options, resume=True, overwrite=False)
    with naming_lost():
        return _run(options, config, source)


def _run(options: Any, config: dict[str, Any], source: Run | None) -> StepMetrics | None:
    if options.resume and finished(options.out):
        console.print(f"{options.out} is finished; nothing to resume", markup=False)
        return None
    Interval(options.checkpoint_steps, options.checkpoint_minutes)  # which refuses bad ones, before anything is done
    device = computing_device(options.device)
    waits = options.timeout_s, options.checkpoint_timeout_s
    parallel = start_world(options.dict_ranks, device, *waits) if launched() else SINGLE
    if options.dict_ranks > 1 and parallel.size == 1:
        raise UserError(f"dict_ranks={options.dict_ranks} needs several processes; start them with torchrun")
    quiet(not parallel.is_main)
    if not hasattr(options, "tokens"):
        cache = open_pair(options.cache, options.target, options.buffer_gb)
        return train_on(cache, options, config, source, device, parallel)
    with stream_cache(options, VARIANTS[options.variant].needs_grads, device) as cache:
        return train_on(cache, options, config, source, device, parallel)


def train_on(
    cache: ActivationCache, options: Any, config: dict[str, Any], source: Run | None, device: Any, parallel: Parallel
) -> StepMetrics | None:
    """Train on an open cache, and say what came of it."""
    d_in = cache.d_in if source is None else source.sae.d_in
    if (d_out := target_width(cache, getattr(options, "d_out", None))) is not None:
        config = {**config, "d_out": d_out}
    sae = build_shard(options.variant, d_in, options.d_sae, options.seed, parallel, **config).to(device)
    whole = whole_of(sae, parallel)
    given = part(TrainConfig, options)
    train_config = prepared(whole, cache, given, parallel, fine_tuning=source is not None)
    if given.lr == "auto":
        rate = chosen_rate(whole, cache, given, source is not None)
        console.print(f"lr auto: {rate.value:.2e} = {rate.why}", markup=False, soft_wrap=True)
    if source is not None:
        dims = split_dims(sae.state_dict(), whole.state_dict())
        sae.load_state_dict(slices(source.sae.state_dict(), dims, parallel))
        announce(source, cache)
    # The old run is deleted last, so that an error in the options does not cost it.
    with claim(options, parallel), stop_on_signals() as stop:
        last = drive(sae, cache, train_config, options, stop, parallel)
    end_world()
    if (last is not None and last.step < n_steps(cache, train_config)) or not finished(options.out):
        name = stop.signal.name if stop.signal is not None else "another process received a signal"
        where = "before the first step" if last is None else f"at step {last.step}"
        console.print(f"{name}: saved {where}; continue with --resume")
        sys.exit(stop.exit_code)
    if options.json and last is not None:
        print_json(last.row())
    elif last is not None:
        out.print(f"{options.variant}: FVU {last.fvu:.4f}, L0 {last.l0:.1f}, {last.dead} dead latents")
    for remark in remarks(sae, last, train_config, options.out) if parallel.is_main else ():
        console.print(f"note: {remark}", markup=False, soft_wrap=True)
    if not options.json:
        out.print(f"saved to {options.out}", markup=False, soft_wrap=True)
    return last


def remarks(sae: SAE, last: StepMetrics | None, config: TrainConfig, folder: Path) -> list[str]:
    """What the user should know about the finished run."""
    failed = "" if last is None else failure(recent_fvu(folder, last.step, last.step), config.rate)
    return [*sae.remarks(), *filter(None, [failed])]


def claim(options: Any, parallel: Parallel) -> contextlib.ExitStack:
    """Lock the run folder, in the main process; if it cannot be written, all processes end at once."""
    stack, refused = contextlib.ExitStack(), False
    if parallel.is_main:
        try:
            inputs = [path for name in ("cache", "target") if (path := getattr(options, name, None)) is not None]
            stack.enter_context(output_folder(options.out, options.overwrite, options.resume, (RUN,), inputs))
        except (UserError, OSError) as error:
            if parallel.size == 1:
                raise
            report(error)  # printed before the others are told: the launcher ends all processes when one has ended
            refused = True
    if parallel.any(refused):
        end_world()
        sys.exit(2)
    return stack


def drive(
    sae: SAE, cache: ActivationCache, config: TrainConfig, options: Any, stop: Stop, parallel: Parallel
) -> StepMetrics | None:
    """Advance the training generator under a progress bar until it ends or a signal asks to stop."""
    total, last = n_steps(cache, config), None
    goal = "" if cache.target is None else f"d_out {sae.d_out} ({cache.goal.hook_name or cache.goal.path}), "
    console.print(
        f"training {sae.variant}: d_in {sae.d_in}, {goal}d_sae {options.d_sae}, "
        f"{total} steps of {config.batch_size} tokens, lr {config.rate:.2g}, dead after {config.dead_after} tokens"
        + (f", {parallel.data_size} data x {parallel.dict_size} dictionary ranks" if parallel.size > 1 else "")
    )
    halves = kernels.arithmetic(config.precision, sae.device) == "bf16"
    console.print(f"kernels: {kernels.describe()}{', selecting in bf16 with values in fp32' if halves else ''}")
    with contextlib.ExitStack() as stack, progress_bar("state") as bar:
        logs = [stack.enter_context(contextlib.closing(log)) for log in loggers(options, config, parallel)]
        make = fit_steps if cache.rolled is None else streamed_steps
        steps: Any = make(
            sae,
            cache,
            config,
            options.out,
            resume=options.resume,
            checkpoint_steps=options.checkpoint_steps,
            checkpoint_minutes=options.checkpoint_minutes,
            logs=logs,
            source=None if options.from_ is None else full_name(options.from_),
            parallel=parallel,
        )
        if cache.rolled is not None:
            harvested = bar.add_task("harvest", total=total * config.batch_size, state="")
            cast(Any, cache).watch(
                lambda _, n, of: bar.update(harvested, completed=n, total=of), lambda: stop.signal is not None
            )
            stack.enter_context(contextlib.suppress(Stopped))
        task = bar.add_task("train", total=total, state="")
        started, first, text, poll = time.perf_counter(), None, "", Poll(parallel)
        for last in steps:
            first = first or last.tokens - config.batch_size
            speed = (last.tokens - first) / (time.perf_counter() - started)
            if last.known:  # else they are on the GPU, which would be waited for
                text = f"FVU {last.fvu:.3f}  L0 {last.l0:.0f}  dead {last.dead}  {speed:,.0f} tokens/s"
            bar.update(task, completed=last.step, state=text)
            if poll(stop.signal is not None) and last.step < total:
                steps.close()
    return last


def loggers(options: Any, config: TrainConfig, parallel: Parallel) -> list[Log]:
    """The optional loggers that were asked for, in the process that logs."""
    logs: list[Log] = []
    if not parallel.is_main:
        return logs
    if options.tensorboard:
        newest = latest_step(options.out)
        logs.append(TensorBoard(options.out, number_of(newest) if newest else 0))
    if options.wandb is not None:
        logs.append(Wandb(options.out, options.wandb, dataclasses.asdict(config)))
    return [*logs, *carrier_of(options.out)]

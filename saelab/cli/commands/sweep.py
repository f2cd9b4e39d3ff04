"""``saelab sweep``: train a grid of SAEs while reading or harvesting activations once, with a table and a report.

Any number of processes may run the command in one folder; each trains and measures SAEs that no other has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import tyro
from rich.console import Group
from rich.progress import Progress
from rich.table import Table

from saelab.cli.console import console, live_view, out, output_folder, parse, part, print_json, progress_bar
from saelab.cli.models import ModelOptions, open_model
from saelab.cli.placement import computing_device
from saelab.cli.processes import beside
from saelab.cli.signals import Stop, stop_on_signals
from saelab.cli.streaming import check_asked, is_asked, stream_cache, sweep_options
from saelab.cli.tables import differences_table, results_table, summary_table
from saelab.data.cache import ActivationCache
from saelab.errors import Stopped, UserError
from saelab.evaluation import EvaluateConfig
from saelab.files import replace, write_json
from saelab.layout import SWEEP, SWEEP_REPORT, SWEEP_TABLE
from saelab.lm.record import ModelRecord
from saelab.sae import VARIANTS
from saelab.sweep import (
    Grid,
    Member,
    guidance,
    hedging_of_widths,
    load_summary,
    measure,
    points_of,
    read_grid,
    run_sweep,
    save_results,
    save_stability,
    save_summary,
    summarise,
)
from saelab.sweep.caches import Caches
from saelab.sweep.claims import PATIENCE, Claims
from saelab.sweep.grid import check_grid
from saelab.sweep.runner import WAIT
from saelab.training import n_steps
from saelab.training.checkpoints import Interval
from saelab.viz.sweep import DIFFERENCES, SUMMARY, WHICH_L0, WIDTHS, chance
from saelab.viz.sweep import report as sweep_report


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """Which grid, and where to write."""

    grid: tyro.conf.Positional[Path]
    """TOML file with [train], [[grid]] and [halving]; its format is described in docs/how-to/sweep.md."""
    out: Path
    """Folder to write: one run folder per SAE, sweep.parquet and report.html."""
    resume: bool = False
    """Continue the sweep in the folder, or begin it; the result is bit-identical to that of an uninterrupted one. Other
    processes, on this or other machines, may be at work in the folder: this one then trains what they have not claimed.
    """
    workers: int | None = None
    """Processes on this machine, which divide the SAEs among them; by default one for each --device. They share the
    CPU's threads equally."""
    at_once: int | None = None
    """SAEs that a process trains in one reading of the cache; by default its equal share of them all."""
    patience: float = PATIENCE
    """Seconds without a sign of life after which an SAE is taken from a process of another machine."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, which are written while the training goes on; SIGINT and SIGTERM save one of each
    SAE and stop."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints, in place of minutes."""
    lm_tokens: int = 0
    """Tokens run through the language model per SAE, for the CE loss recovered; 0 leaves it out."""
    overwrite: bool = False
    """Replace an existing folder."""
    json: bool = False
    """Print the table as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """Which cache."""

    cache: tyro.conf.Positional[Path]
    """Folder of the activation cache, which is read once for all SAEs; or a folder of caches, as a harvest at several
    hook points writes it: each is one more value of the grid's `cache`. To harvest while training instead, leave it out
    and give --tokens and --text: `saelab sweep --tokens N --help` lists their options."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions, OwnOptions, CacheOptions):
    """What to train, where, and the model to measure in."""

    device: tuple[str, ...] = ("auto",)  # pyright: ignore[reportIncompatibleVariableOverride]
    """Where the SAEs and the language model run: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one. With
    several, such as cuda:0 cuda:1, a process works on each."""


def main(args: Sequence[str]) -> None:
    """Check the grid, train it, measure every SAE on held-out tokens, write table and report."""
    streams = is_asked(args)
    if streams:
        check_asked(args, 1)
    cls: Any = sweep_options(OwnOptions) if streams else Options
    about = "Train a grid of SAEs while reading the cache once, and compare them on held-out tokens."
    options = parse(cls, "sweep", args, about)
    Interval(options.checkpoint_steps, options.checkpoint_minutes)  # which refuses bad ones, before anything is done
    if streams:
        stream(options)
        return
    places = workers_of(options)
    *_, device = (computing_device(place) for place in reversed(places))  # the last one becomes the current device
    caches = Caches.open(options.cache)
    grid = read_grid(options.grid, caches.names)
    share = options.at_once or -(-grid.first_reading() // len(places))
    at_once = options.at_once if len(places) == 1 else share
    others = [arguments(options, place, share) for place in places[1:]]
    model = dataclasses.replace(part(ModelOptions, options), device=places[0])
    run(grid, caches, options, model, device, at_once, others)


def stream(options: Any) -> None:
    """The sweep on activations that are harvested meanwhile, in one process."""
    device = computing_device(options.device)
    grid = read_grid(options.grid, assumed={"epochs": 1})
    if grid.tuning is not None:
        raise UserError(
            'lr = "tune" reads the activations several times, and they are harvested once; tune on a cache of the same '
            "text and give the rates"
        )
    if any(entry.pair[1] for entry in grid.entries):
        raise UserError(
            f"{options.grid}: target: a transcoder needs the activations of two places, and one is harvested while "
            "training; harvest both and sweep their caches"
        )
    gradients = any(VARIANTS[entry.variant].needs_grads for entry in grid.entries if entry.variant in VARIANTS)
    with stream_cache(options, gradients, device) as cache:
        where = {"model": options.model, "device": options.model_device or options.device}
        model = ModelOptions(**where, revision=options.revision, device_map=options.device_map)
        run(grid, Caches.of(cache), options, model, device)


def run(
    grid: Grid,
    caches: Caches,
    options: Any,
    model: ModelOptions,
    device: Any,
    at_once: int | None = None,
    others: Sequence[Sequence[str]] = (),
) -> None:
    """Train a grid that was read, and measure its SAEs, also in ``model`` where that is asked for; beside ``others``,
    the command lines of further processes."""
    check_grid(grid, caches)
    check_measuring(grid, caches, options)
    claims = Claims(options.out, options.patience)
    prepare_folder(options, claims)
    try:
        with beside(others), stop_on_signals() as stop:
            members = train(grid, caches, options, device, stop, claims, at_once)
            if members is None:
                assert stop.signal is not None
                console.print(f"{stop.signal.name}: all SAEs saved; continue with --resume")
                sys.exit(stop.exit_code)
            rows = evaluate(members, caches, options, claims, model)
            with claims.only("report"):
                found = write_report(rows, options.out, claims)
    finally:
        claims.leave()
    if options.json:
        print_json(rows)
    else:
        show(rows, *found)
        paths = f"{options.out / SWEEP_TABLE} and {options.out / SWEEP_REPORT}"
        out.print(f"saved to {paths}", markup=False, soft_wrap=True)


def workers_of(options: Options) -> list[str]:
    """The devices of this machine's processes, this one's first."""
    count = len(options.device) if options.workers is None else options.workers
    if not options.device or count < max(1, len(options.device)):
        raise UserError(f"workers={count} for device={' '.join(options.device)}; give at least one for each device")
    if options.at_once is not None and options.at_once < 1:
        raise UserError(f"at_once={options.at_once} must be at least 1")
    return [options.device[number % len(options.device)] for number in range(count)]


def arguments(options: Options, device: str, at_once: int) -> list[str]:
    """The command line of a further process on this machine."""
    line = ["sweep", str(options.cache), str(options.grid), "--resume", "--device", device]
    values = {name: getattr(options, name) for name in ("out", "checkpoint_minutes", "lm_tokens", "patience")}
    values |= {"at_once": at_once, "checkpoint_steps": options.checkpoint_steps}
    values |= {f.name: getattr(options, f.name) for f in dataclasses.fields(ModelOptions) if f.name != "device"}
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            line.append(option)
        elif value is not None and value is not False:
            line += [option, str(value)]
    return line


def check_measuring(grid: Grid, caches: Caches, options: Any) -> None:
    """UserError where the SAEs could be trained and not be measured."""
    EvaluateConfig(lm_tokens=options.lm_tokens)  # which refuses bad ones
    for pair in grid.parts():
        if not caches.get(pair).n_split("held_out"):
            raise UserError(
                f"{caches.get(pair).path} has no held-out rows to measure the SAEs on; harvest it with --held-out "
                "above 0"
            )
    if options.lm_tokens and not (options.model or caches.first.manifest.model):
        raise UserError(
            f"lm_tokens={options.lm_tokens} needs the language model, which {caches.first.path} does not name; give it "
            "with --model, or leave lm_tokens at 0"
        )


def prepare_folder(options: Any, claims: Claims) -> None:
    """Empty the folder where that is asked for, which is done last, so that an error in the options does not cost it.

    UserError for a folder that is not empty without --resume, and for one that others work on without it.
    """
    if options.resume and not options.out.is_file():
        return
    if claims.others():
        raise UserError(
            f"another process is writing {options.out}; wait for it, work on it too with --resume, or choose another "
            "folder"
        )
    inputs = [getattr(options, name, "") or "" for name in ("grid", "cache", "target")]
    with output_folder(options.out, options.overwrite, options.resume, (SWEEP,), inputs):
        pass


def write_report(rows: Sequence[dict[str, Any]], folder: Path, claims: Claims) -> tuple[Any, Any, list[str]]:
    """Write tables and report, unless another process has just done so; what they say of means, differences, widths."""
    widths = hedging_of_widths(rows, folder)
    if (written := claims.notes("report", ".written")).exists():
        return *load_summary(folder), widths
    save_results(rows, folder)
    summaries, differences = summarise(rows, folder)
    save_summary(summaries, differences, folder)
    save_stability(rows, folder)
    page = sweep_report(rows, folder.name, summaries, differences, widths)
    replace(folder / SWEEP_REPORT, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    written.touch()
    return summaries, differences, widths


def show(
    rows: Sequence[dict[str, Any]],
    summaries: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    widths: Sequence[str],
) -> None:
    """Print the tables, and what they say of the number of active latents and of widths."""
    out.print(results_table(rows))
    if any(row["seeds"] > 1 for row in summaries):
        out.print(f"\n{SUMMARY}", summary_table(summaries), sep="\n")
    if differences:
        out.print(f"\n{DIFFERENCES}", differences_table(differences), chance(differences), sep="\n")
    for title, lines in ((WHICH_L0, [one.sentence for one in guidance(points_of(rows))]), (WIDTHS, widths)):
        if lines:
            out.print(f"\n{title}")
        for line in lines:
            out.print(line, markup=False)
    for row in rows:
        if row["message"]:
            out.print(f"{row['name']}: {row['message']}", markup=False)


def train(
    grid: Grid, caches: Caches, options: Any, device: Any, stop: Stop, claims: Claims, at_once: int | None
) -> list[Member] | None:
    """Run the sweep under a live table; None if a signal stopped it."""
    views, config = [part.view(caches.get(pair)) for pair, part in grid.parts().items()], grid.entries[0].train
    total, members, shown, done = sum(n_steps(cache, config) for cache in views), [], 0.0, 0
    rows = min(cache.n_split("validation") for cache in views)
    tuned = f"; learning rates are compared on {rows} validation rows, which no SAE trains on" if grid.tuning else ""
    over = f" over {len(views)} caches" if len(views) > 1 else ""
    count = f"{len(grid.entries)} SAE{'s' * (len(grid.entries) > 1)}"
    console.print(f"{count}, {total} steps of {config.batch_size} tokens{over}{tuned}")
    sweep = run_sweep(
        grid,
        caches,
        options.out,
        resume=options.resume or at_once is not None,  # another process may have begun it a moment ago
        checkpoint_steps=options.checkpoint_steps,
        checkpoint_minutes=options.checkpoint_minutes,
        device=device,
        at_once=at_once,
        claims=claims,
    )
    bar = progress_bar("speed")
    if caches.first.rolled is not None:
        harvested = bar.add_task("harvest", total=None, speed="")
        report = partial(_harvested, bar, harvested)
        cast(Any, caches.first).watch(report, lambda: stop.signal is not None)
    task, started = bar.add_task("sweep", total=100, speed=""), time.perf_counter()
    with live_view() as live, contextlib.suppress(Stopped):
        live.update(view(members, bar))
        for members in sweep:
            done += any(member.run is not None for member in members)
            if time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                speed = f"{done * config.batch_size / (shown - started):,.0f} tokens/s"
                bar.update(task, completed=_percent(members, n_steps(views[0], config)), speed=speed)
                live.update(view(members, bar))
            if stop.signal is not None and any(m.status == "running" for m in members):
                sweep.close()
                return None
        bar.update(task, completed=100)
        live.update(view(members, bar))
        return members
    return None


def _harvested(bar: Progress, task: Any, _: str, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def _percent(members: Sequence[Member], total: int) -> float:
    """How many of the steps have been done or are not needed any more."""
    return 100 * sum(m.step if m.status == "running" else total for m in members) / max(1, total * len(members))


def view(members: Sequence[Member], bar: Progress) -> Group:
    """The live table, one line per SAE, over the progress bar."""
    table = Table("SAE", "status", "step", "L0", "FVU", "dead", box=None, pad_edge=False)
    for member in members:
        last = member.last
        numbers = ("", "", "") if last is None else (f"{last.l0:.1f}", f"{last.fvu:.4f}", str(last.dead))
        table.add_row(member.entry.name, member.status, str(member.step), *numbers)
    return Group(table, bar)


def evaluate(
    members: Sequence[Member], caches: Caches, options: Any, claims: Claims, wanted: ModelOptions
) -> list[dict[str, Any]]:
    """Measure the finished SAEs on held-out tokens, under a progress bar, each in one of the processes at work."""
    cache, config = caches.first, EvaluateConfig(lm_tokens=options.lm_tokens)
    if cache.rolled is not None:
        caches = Caches.of(ActivationCache(cache.path))  # of the documents that were kept
    models: list[Any] = [] if config.lm_tokens else [None]

    def measure_one(member: Member) -> dict[str, Any]:
        if not models:
            models.append(open_model(wanted, ModelRecord.from_manifest(cache.manifest), str(cache.path), plain=True))
        return measure([member], caches, models[0], config)[0]

    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(members))
        about = f"{config.lm_tokens} {options.model} {options.revision} {options.model_dtype}"
        return shared_rows(members, claims, measure_one, about, lambda: bar.advance(task))


def shared_rows(
    members: Sequence[Member],
    claims: Claims,
    measure_one: Callable[[Member], dict[str, Any]],
    about: str,
    progress: Callable[[], object],
) -> list[dict[str, Any]]:
    """A row for each member, measured here or by another process that measures it in the same way (``about``)."""
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < len(members):
        for member in members:
            name = member.entry.name
            path = claims.notes(name, ".row")
            if name in rows or not claims.take(name):
                continue
            try:
                known = json.loads(path.read_bytes()) if path.is_file() else {}
                rows[name] = known["row"] if known.get("about") == about else measure_one(member)
                write_json(path, {"about": about, "row": rows[name]})
            finally:
                claims.give_back(name)
            progress()
        time.sleep(0 if len(rows) == len(members) else WAIT)
    return [rows[member.entry.name] for member in members]

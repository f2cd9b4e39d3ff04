"""``saelab sweep``: train a grid of SAEs while reading one cache once, with a live table and a report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from saelab.cli.console import console, out, output_folder, parse, print_json, progress_bar
from saelab.cli.models import ModelOptions, open_model
from saelab.cli.placement import computing_device
from saelab.cli.signals import Stop, stop_on_signals
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig
from saelab.files import replace
from saelab.layout import SWEEP_REPORT
from saelab.lm.record import ModelRecord
from saelab.sweep import (
    Grid,
    Member,
    guidance,
    hedging_of_widths,
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
from saelab.sweep.grid import check_grid
from saelab.training import n_steps
from saelab.training.checkpoints import Interval
from saelab.viz.sweep import DIFFERENCES, SUMMARY, WHICH_L0, WIDTHS, chance
from saelab.viz.sweep import report as sweep_report


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """Which cache, which grid, and where to write."""

    cache: tyro.conf.Positional[Path]
    """Folder of the activation cache, which is read once for all SAEs; or a folder of caches, as a harvest at several
    hook points writes it: each is one more value of the grid's `cache`."""
    grid: tyro.conf.Positional[Path]
    """TOML file with [train], [[grid]] and [halving]; its format is described in docs/how-to/sweep.md."""
    out: Path
    """Folder to write: one run folder per SAE, sweep.parquet and report.html."""
    resume: bool = False
    """Continue the sweep in the folder; the result is bit-identical to that of an uninterrupted one."""
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
class Options(ModelOptions, OwnOptions):
    """What to train, where, and the model to measure in."""


def main(args: Sequence[str]) -> None:
    """Check the grid, train it, measure every SAE on held-out tokens, write table and report."""
    options = parse(
        Options,
        "sweep",
        args,
        "Train a grid of SAEs while reading the cache once, and compare them on held-out tokens.",
    )
    Interval(options.checkpoint_steps, options.checkpoint_minutes)  # which refuses bad ones, before anything is done
    caches, device = Caches.open(options.cache), computing_device(options.device)
    grid, cache = read_grid(options.grid, caches.names), caches.first
    check_grid(grid, caches)
    config = EvaluateConfig(lm_tokens=options.lm_tokens)
    for pair in grid.parts():
        if not caches.get(pair).n_split("held_out"):
            raise UserError(
                f"{caches.get(pair).path} has no held-out rows to measure the SAEs on; harvest it with --held-out "
                "above 0"
            )
    if options.lm_tokens and not (options.model or cache.manifest.model):
        raise UserError(
            f"lm_tokens={options.lm_tokens} needs the language model, which {cache.path} does not name; give it with "
            "--model, or leave lm_tokens at 0"
        )
    # The old sweep is deleted last, so that an error in the options does not cost it.
    with output_folder(options.out, options.overwrite, options.resume):
        with stop_on_signals() as stop:
            members = train(grid, caches, options, device, stop)
        if members is None:
            assert stop.signal is not None
            console.print(f"{stop.signal.name}: all SAEs saved; continue with --resume")
            sys.exit(stop.exit_code)
        rows = evaluate(members, caches, config, options)
        path = save_results(rows, options.out)
        summaries, differences = summarise(rows, options.out)
        save_summary(summaries, differences, options.out)
        save_stability(rows, options.out)
        report = options.out / SWEEP_REPORT
        widths = hedging_of_widths(rows, options.out)
        page = sweep_report(rows, options.out.name, summaries, differences, widths)
        replace(report, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    if options.json:
        print_json(rows)
    else:
        show(rows, summaries, differences, widths)
        out.print(f"saved to {path} and {report}", markup=False, soft_wrap=True)


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
        out.print(f"\n{DIFFERENCES}", differences_table(differences), chance(len(differences)), sep="\n")
    for title, lines in ((WHICH_L0, [one.sentence for one in guidance(points_of(rows))]), (WIDTHS, widths)):
        if lines:
            out.print(f"\n{title}")
        for line in lines:
            out.print(line, markup=False)
    for row in rows:
        if row["message"]:
            out.print(f"{row['name']}: {row['message']}", markup=False)


def train(grid: Grid, caches: Caches, options: Options, device: Any, stop: Stop) -> list[Member] | None:
    """Run the sweep under a live table; None if a signal stopped it."""
    views, config = [part.view(caches.get(pair)) for pair, part in grid.parts().items()], grid.entries[0].train
    total, members, shown, done = sum(n_steps(cache, config) for cache in views), [], 0.0, 0
    rows = min(cache.n_split("validation") for cache in views)
    tuned = f"; learning rates are compared on {rows} validation rows, which no SAE trains on" if grid.tuning else ""
    over = f" over {len(views)} caches" if len(views) > 1 else ""
    console.print(f"{len(grid.entries)} SAEs, {total} steps of {config.batch_size} tokens{over}{tuned}")
    sweep = run_sweep(
        grid,
        caches,
        options.out,
        resume=options.resume,
        checkpoint_steps=options.checkpoint_steps,
        checkpoint_minutes=options.checkpoint_minutes,
        device=device,
    )
    bar = progress_bar("speed")
    task, started = bar.add_task("sweep", total=total, speed=""), time.perf_counter()
    with Live(console=console, refresh_per_second=2) as live:
        for members in sweep:
            step = max((m.step for m in members if m.status == "running"), default=total)
            done += 1
            step = step if len(views) == 1 else min(done, total)  # caches are read one after the other
            if time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                speed = done * config.batch_size / (shown - started)
                bar.update(task, completed=step, speed=f"{speed:,.0f} tokens/s")
                live.update(view(members, bar))
            if stop.signal is not None and any(m.status == "running" for m in members):
                sweep.close()
                return None
        bar.update(task, completed=total)
        live.update(view(members, bar))
    return members


def view(members: Sequence[Member], bar: Progress) -> Group:
    """The live table, one line per SAE, over the progress bar."""
    table = Table("SAE", "status", "step", "L0", "FVU", "dead", box=None, pad_edge=False)
    for member in members:
        last = member.last
        numbers = ("", "", "") if last is None else (f"{last.l0:.1f}", f"{last.fvu:.4f}", str(last.dead))
        table.add_row(member.entry.name, member.status, str(member.step), *numbers)
    return Group(table, bar)


def evaluate(
    members: Sequence[Member], caches: Caches, config: EvaluateConfig, options: ModelOptions
) -> list[dict[str, Any]]:
    """Measure the finished SAEs on held-out tokens, under a progress bar."""
    cache = caches.first
    record = ModelRecord.from_manifest(cache.manifest)
    model = open_model(options, record, str(cache.path), plain=True) if config.lm_tokens else None
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(members))
        return measure(members, caches, model, config, lambda _: bar.advance(task))


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The results, best FVU first within each sparsity."""
    table = Table("SAE", "status", "lr", "L0", "FVU", "dead", "CE recovered", box=None, pad_edge=False)
    for row in sorted(rows, key=lambda r: (r["l0"] is None, r["l0"] or 0.0)):
        numbers = [row["l0"], row["fvu"], row["dead_fraction"], row["ce_loss_recovered_zero"]]
        cells = ["" if n is None else f"{n:.{d}f}" for n, d in zip(numbers, (1, 4, 3, 4))]
        table.add_row(row["name"], row["status"], _rate(row), *cells)
    return table


def summary_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Means over seeds."""
    table = Table("SAE", "seeds", "L0", "FVU", "interval", "dead", "shared by seeds", box=None, pad_edge=False)
    for row in summaries:
        interval = "cannot say" if row["fvu_low"] is None else f"{row['fvu_low']:.4f} .. {row['fvu_high']:.4f}"
        shared = ""
        if row["shared_latents"] is not None:
            shared = f"{row['shared_latents']:.1%} ({row['shared_by_chance']:.1%} by chance)"
        numbers = (f"{row['l0']:.1f}", f"{row['fvu']:.4f}", interval, f"{row['dead_fraction']:.3f}")
        table.add_row(row["name"], str(row["seeds"]), *numbers, shared)
    return table


def differences_table(differences: Sequence[dict[str, Any]]) -> Table:
    """The differences, largest first."""
    table = Table("a", "b", "FVU of a - b", "interval", "verdict", box=None, pad_edge=False)
    for row in sorted(differences, key=lambda row: -abs(row["difference"])):
        interval = "" if row["low"] is None else f"{row['low']:+.4f} .. {row['high']:+.4f}"
        table.add_row(row["a"], row["b"], f"{row['difference']:+.4f}", interval, row["verdict"])
    return table


def _rate(row: dict[str, Any]) -> str:
    lr = "" if row["lr"] is None else f"{row['lr']:.2g}"
    return f"{lr} of {len(json.loads(row['tried']))}" if row["tried"] else lr

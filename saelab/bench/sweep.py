"""Does a sweep cost more than its parts? ``python -m saelab.bench.sweep`` trains eight SAEs both ways and compares.

Both ways run in one process, a few steps of each in turn, so that a busy machine slows both; what is printed are ratios
of sums, in wall time and in this process's CPU time. The compute of an SAE alone is measured on batches that are
already in memory; reading is measured on its own, and how long the sweep waits for it.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.data.cache import ActivationCache, Batch
from saelab.sweep import run_sweep
from saelab.sweep.grid import Entry, Grid, make_grid
from saelab.training import batches, train_steps


@dataclass(frozen=True)
class Options:
    """Sizes of the comparison; the defaults are those of docs/benchmarks.md."""

    d_in: int = 576
    """Width of the activations."""
    d_sae: int = 4608
    """Latents of each SAE."""
    batch_size: int = 2048
    """Tokens per step."""
    rounds: int = 6
    """Turns; each way takes two steps in each."""
    threads: int | None = None
    """Threads; by default all."""
    out: Path | None = None
    """JSON file to write."""


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """Run both ways in ``folder`` and return the ratios."""
    steps = 2 * options.rounds + 2  # the first two warm up
    cache = make_cache(options, folder / "cache", (steps + 1) * options.batch_size)
    grid, clock = eight(options), Clock()
    alone = [_alone(entry, cache) for entry in grid.entries]
    waits = _timed_stream(cache, clock)
    sweep = run_sweep(grid, waits, folder / "sweep")  # pyright: ignore[reportArgumentType]
    reading = batches(cache, grid.entries[0].train, 0, False)
    for work in (lambda: [next(run) for run in alone], lambda: next(sweep), lambda: next(reading)):
        work()
        work()
    clock.clear()
    for _ in range(options.rounds):
        for _ in range(2):
            clock.time("alone", lambda: [next(run) for run in alone])
        for _ in range(2):
            clock.time("sweep", lambda: next(sweep))
        for _ in range(2):
            clock.time("reading", lambda: next(reading))
    sweep.close()
    for run in alone:
        run.close()
    reading.close()
    total = {name: clock.total(name) for name in ("alone", "sweep", "reading", "wait")}
    per_step = {name: seconds.wall / (2 * options.rounds) for name, seconds in total.items()}
    ratios = {
        "sweep over sum of its parts, wall": total["sweep"].wall / (total["alone"].wall + total["reading"].wall),
        "sweep over sum of its parts, cpu": total["sweep"].cpu / (total["alone"].cpu + total["reading"].cpu),
        "share of the sweep's time spent waiting for the loader": total["wait"].wall / total["sweep"].wall,
        "loader's cpu over one SAE's step, cpu": total["reading"].cpu / (total["alone"].cpu / len(alone)),
    }
    return {"saes": len(alone), "threads": torch.get_num_threads(), "seconds per step": per_step, "ratios": ratios}


def eight(options: Options) -> Grid:
    """Two variants, two sparsities, two seeds."""
    block = {"variant": ["topk", "abs_topk"], "d_sae": options.d_sae, "k": [16, 32], "seed": [0, 1]}
    return make_grid({"train": {"epochs": 1, "batch_size": options.batch_size}, "grid": [block]})


def make_cache(options: Options, path: Path, rows: int) -> ActivationCache:
    """Activations with a planted dictionary."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2 * options.d_in, options.d_in, generator=generator)
    codes = torch.rand(rows, 2 * options.d_in, generator=generator)
    acts = (codes * (codes > 0.98)) @ directions
    return ActivationCache.from_tensors(path, acts, held_out=0.0, dtype="bfloat16")


def _alone(entry: Entry, cache: ActivationCache) -> Generator[Any]:
    held = list(itertools.islice(batches(cache, entry.train, 0, False), 4))
    return train_steps(entry.build(cache.d_in), cache, entry.train, stream=itertools.cycle(held))


def _timed_stream(cache: ActivationCache, clock: Clock) -> ActivationCache:
    """The same cache, whose training batches are timed while the reader waits for them."""
    plain = cache.batches

    def timed(*args: Any, **options: Any) -> Iterator[Batch]:
        stream = plain(*args, **options)
        while (batch := clock.time("wait", lambda: next(stream, None))) is not None:
            yield batch

    other = ActivationCache(cache.path)
    other.batches = timed  # pyright: ignore[reportAttributeAccessIssue]
    return other


def main(args: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    options = command.options(Options, "sweep", __doc__, args)
    folder = Path(tempfile.mkdtemp())
    try:
        result = compare(options, folder)
    finally:
        shutil.rmtree(folder)
    console = Console(highlight=False)
    for name, seconds in result["seconds per step"].items():
        console.print(f"{name:<10} {1e3 * seconds:9.1f} ms a step")
    for name, ratio in result["ratios"].items():
        console.print(f"{name:<60} {ratio:.3f}")
    write_out(options.out, result)


if __name__ == "__main__":
    command.run(main)

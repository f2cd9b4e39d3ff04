"""The best learning rate for many runs: ``python -m saelab.bench.learning_rate --caches A B --out results.jsonl``.

For each point of :mod:`saelab.bench.learning_rate.design` (a cache, a variant, batch size, width, steps, k) rates on a
lattice of factor 2 are tried, from a guess (a fit to what has been measured so far) until both neighbours of the best
one are known to be worse. Every trained SAE is one line of ``--out``: the point, the rate, and the FVU on held-out
rows. A second run continues where the first one stopped.

Each SAE is trained by the steps of ``saelab train`` with its default settings: Adam (beta 0.9 and 0.999, eps
6.25e-10), a rate that rises over the first 5 % of the steps and falls linearly over the last 20 %, gradient norm
clipped at 1, AuxK with weight 1/32. Two things differ: the number of steps is free (``saelab train`` runs whole
epochs), and thresholds are set on 4,096 rows.

``--fit`` trains nothing: it prints the best rates in ``--out``, rules fitted to them, and what each rule costs in FVU.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from saelab.bench import command
from saelab.bench.learning_rate.design import Point, design, sparsity
from saelab.bench.learning_rate.results import append, read
from saelab.bench.learning_rate.rules import guess, report
from saelab.bench.timing import Seconds
from saelab.data.cache import ActivationCache
from saelab.data.synthetic import Planted
from saelab.errors import UserError, damaged
from saelab.evaluation.reconstruction import measure_batch
from saelab.metrics import FiringCounts, ReconstructionSums
from saelab.sae import SAE, build
from saelab.training import Diverged, TrainConfig, TrainState, batches, centre_of, prepared, start, train_step

LATTICE = 1e-3  # rates tried are this times a power of two
MOST = 12  # rates tried for one point
HELD_OUT = 8192  # rows, evenly spread over the held-out split
CALIBRATION = 4096  # training rows on which thresholds are set; the trainer takes 32,768
CHUNK = 2048  # held-out rows at a time
console = Console(soft_wrap=True, markup=False, highlight=False)


@dataclass(frozen=True)
class Options:
    """What to measure, and where to keep it."""

    out: Path
    """JSON lines, one per trained SAE; new ones are appended."""
    caches: tuple[Path, ...] = ()
    """Folders of activation caches. Their names in the results are the last two parts of the path."""
    planted: Path | None = None
    """Write the planted world's cache to this folder and stop; name it in --caches afterwards."""
    seed: int = 0
    """Seed of the sample of points, and of the SAEs."""
    points: int | None = None
    """Stop after this many points; by default at the end of the sample."""
    minutes: float | None = None
    """Begin no new point after this many minutes."""
    keys: Path | None = None
    """Measure the points in this file of JSON lines (a file of results, for example) instead of the sample."""
    threads: int = 1
    """Threads of one training run."""
    fit: bool = False
    """Train nothing; print rules fitted to the output so far, and their regret."""
    only: tuple[str, ...] = ()
    """With --fit: beginnings of the names of the caches to use; by default all."""


@dataclass
class Bench:
    """The caches by name, with what every run on them needs."""

    caches: dict[str, ActivationCache]
    centres: dict[str, Tensor] = field(default_factory=dict)  # geometric medians in scaled units, [d_in]
    held_out: dict[str, Tensor] = field(default_factory=dict)  # [HELD_OUT, d_in]

    def cache(self, point: Point) -> ActivationCache:
        """The cache of a point, opened with the scale that the point asks for."""
        if point.cache not in self.caches:
            raise UserError(f"{point.key} needs the cache {point.cache}; name its folder with --caches")
        cache = self.caches[point.cache]
        if point.scale != 1:
            cache = ActivationCache(cache.path)
            cache.manifest.scale *= point.scale
        return cache

    def centre(self, name: str) -> Tensor:
        """Where a run on the cache starts its offset, in units of the scaled data. ``[d_in]``"""
        if name not in self.centres:
            self.centres[name] = centre_of(self.caches[name], TrainConfig(), torch.device("cpu"))
        return self.centres[name]

    def rows(self, name: str) -> Tensor:
        """Held-out activations, evenly spread over the held-out split. ``[HELD_OUT, d_in]`` or fewer rows"""
        if name not in self.held_out:
            first, stop = self.caches[name].split_rows("held_out")
            if first == stop:
                raise UserError(f"the held-out split of {self.caches[name].path} is empty; harvest with --held-out 0.1")
            rows = self.caches[name].spread_rows(HELD_OUT, "held_out")
            self.held_out[name] = self.caches[name].read(rows).acts.float()
        return self.held_out[name]


def name_of(path: Path) -> str:
    """A cache's name in the results: the last two parts of its path, without what follows ``.hook_``."""
    return "/".join(part.split(".hook_")[0] for part in path.resolve().parts[-2:])


def train_once(point: Point, lr: float, bench: Bench) -> dict[str, Any]:
    """Train one SAE and measure it; a run that diverges has no FVU. ``seconds`` are of processor time."""
    cache, began = bench.cache(point), Seconds.now()
    torch.manual_seed(point.seed)
    sae = build(
        point.variant, d_in=cache.d_in, d_sae=point.d_sae, **{**sparsity(point.variant, point.k), **point.options}
    )
    config = prepared(sae, cache, train_config(point, lr, cache))
    state = start(sae, cache, config, bench.centre(point.cache) * point.scale)
    record: dict[str, Any] = {"lr": lr, "d_in": cache.d_in, "epochs": point.n_steps / _per_epoch(point, cache)}
    try:
        record |= run(sae, cache, config, state, point.n_steps)
        record |= measure(sae, cache, state, bench.rows(point.cache)) | {"diverged": False}
    except Diverged:
        record |= {"fvu": None, "loss": None, "diverged": True}
    return record | {"seconds": round(Seconds.now().since(began).cpu, 2)}


def _per_epoch(point: Point, cache: ActivationCache) -> int:
    return max(1, cache.n_batches(point.batch_size, split="train", drop_last=True))


def train_config(point: Point, lr: float, cache: ActivationCache) -> TrainConfig:
    """The trainer's defaults; a latent is dead after a tenth of the run, as there."""
    tokens = point.n_steps * point.batch_size
    return TrainConfig(
        epochs=math.ceil(point.n_steps / _per_epoch(point, cache)),
        batch_size=point.batch_size,
        lr=lr,
        dead_after=max(1, tokens // 10),
        seed=point.seed,
        data_seed=point.seed,
        **point.train,
    )


def run(
    sae: SAE, cache: ActivationCache, config: TrainConfig, state: TrainState, n_steps: int
) -> dict[str, float | int]:
    """Train for ``n_steps``; the weights stay in units of the scaled data. Returns numbers of the last steps."""
    state.unfold(sae)
    sae.train()
    recent: list[float] = []
    for batch in itertools.islice(batches(cache, config, 0, sae.needs_grads), n_steps):
        recent = [*recent[-9:], train_step(sae, batch, config, state, n_steps).fvu]
    sae.schedule(n_steps, n_steps)
    sae.normalise_decoder()
    sae.eval()
    sample = next(cache.batches(min(CALIBRATION, cache.n_split("train")), split="train", seed=config.data_seed)).acts
    sae.calibrate([sample.float() * state.scale])
    dead = int((state.tokens_since_fired > config.dead_limit).sum())
    return {"train_fvu": float(np.mean(recent)), "dead": dead / sae.d_sae}


@torch.no_grad()
def measure(sae: SAE, cache: ActivationCache, state: TrainState, x: Tensor) -> dict[str, float]:
    """FVU and L0 of held-out rows ``x [n, d_in]``, and ``loss``, by which rates are compared: the FVU."""
    state.fold(sae)
    sums = ReconstructionSums(-(-len(x) // CHUNK), torch.tensor(cache.manifest.mean, dtype=torch.float64))
    firing = FiringCounts(sae.d_sae)
    for number, part in enumerate(x.split(CHUNK)):
        measure_batch(sae, part, None, torch.full((len(part),), number), sums, firing)
    found = sums.estimates()
    fvu = found["fvu"].value
    return {"fvu": fvu, "l0": found["l0"].value, "loss": fvu}


def search(first: float, known: Mapping[int, float], attempt: Callable[[int], float]) -> Iterator[tuple[int, float]]:
    """Try rates on the lattice until both neighbours of the best one are known and worse; yields what was tried.

    ``first`` is the rate to begin with. ``known`` maps places on the lattice to losses, infinite for divergence;
    ``attempt`` measures one place.
    """
    losses = dict(known)
    while len(losses) < MOST:
        best = min(losses, key=lambda place: losses[place]) if losses else None
        if best is None:
            place = round(math.log2(first / LATTICE))
        elif not math.isfinite(losses[best]):
            place = min(losses) - 2  # everything diverged so far
        elif best + 1 not in losses:
            place = best + 1
        elif best - 1 not in losses:
            place = best - 1
        else:
            return
        losses[place] = attempt(place)
        yield place, losses[place]


def listed(path: Path) -> Iterator[Point]:
    """The points of a file of JSON lines with the fields of :class:`Point`, each once."""
    names = {f.name for f in dataclasses.fields(Point)}
    found: dict[str, Point] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        with damaged(f"line {number} of {path}", f"write one JSON object with {', '.join(sorted(names))}"):
            point = Point(**{name: value for name, value in json.loads(line).items() if name in names})
            found.setdefault(point.key, point)
    yield from found.values()


def grid(options: Options, points: Iterator[Point], bench: Bench) -> None:
    """Find the best rate of each point, one after the other."""
    records, began = read(options.out), time.monotonic()
    for number, point in enumerate(points):
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            return
        known = {
            round(math.log2(row["lr"] / LATTICE)): math.inf if row["loss"] is None else row["loss"]
            for row in records
            if row["key"] == point.key
        }

        def attempt(place: int, point: Point = point, number: int = number) -> float:
            record = {**point.row(), "number": number, **train_once(point, LATTICE * 2.0**place, bench)}
            append(options.out, record)
            records.append(record)
            return math.inf if record["loss"] is None else record["loss"]

        for place, loss in search(guess(records, point.row()), known, attempt):
            seconds = records[-1]["seconds"]
            console.print(f"{number} {point.key} lr {LATTICE * 2.0**place:.3g} loss {loss:.5f} ({seconds:.1f} s)")


def planted(path: Path, rows: int = 320_000) -> ActivationCache:
    """The cache of the planted world: 1,024 directions in 128 dimensions, 24 of them active per row."""
    world = Planted(128, 1024, l0=24, zipf=0.5, correlated=128, anticorrelated=64, signed=128, noise=0.05, seed=3)
    parts = [world.sample(rows // 16, seed=seed)[0] for seed in range(16)]
    return ActivationCache.from_tensors(path, torch.cat(parts), held_out=0.05, model="planted")


def start_grid(options: Options) -> None:
    """Open the caches and measure the points."""
    if not options.caches:
        raise UserError("name at least one activation cache with --caches")
    torch.set_num_threads(options.threads)
    bench = Bench({name_of(path): ActivationCache(path) for path in options.caches})
    described = [(name, cache.d_in, cache.has_grads) for name, cache in bench.caches.items()]
    points = design(described, options.seed) if options.keys is None else listed(options.keys)
    grid(options, itertools.islice(points, options.points), bench)


def main(args: Sequence[str] | None = None) -> None:
    """Measure, or fit what was measured."""
    options = command.options(Options, "learning_rate", __doc__, args)
    if options.fit:
        console.print(report(read(options.out), options.only))
    elif options.planted is not None:
        planted(options.planted)
    else:
        start_grid(options)


if __name__ == "__main__":
    command.run(main)

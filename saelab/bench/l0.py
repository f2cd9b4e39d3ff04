"""Do penalties end at the L0 asked for? ``python -m saelab.bench.l0`` trains them and measures it on held-out tokens.

Of every variant with a sparsity penalty, at several L0 and multiples of the default learning rate; trained on a planted
dictionary, or with ``--cache`` on any activation cache. ``trained`` is the L0 that the controller ended at, before the
last shift.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.data.cache import ActivationCache
from saelab.data.synthetic import Planted
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.sae import VARIANTS, build
from saelab.sae.penalty import PenaltySAE
from saelab.training import TrainConfig, chosen_rate, n_steps, train_steps


@dataclass(frozen=True)
class Options:
    """What to train on what."""

    cache: Path | None = None
    """Activation cache; by default a planted dictionary of 256 features in 64 dimensions, 8 of them active."""
    variants: tuple[str, ...] = ()
    """Variants; by default all with a sparsity penalty."""
    l0: tuple[float, ...] = (4, 16, 32, 64)
    """Active latents per token to ask for."""
    factors: tuple[float, ...] = (0.25, 1, 4)
    """Multiples of the default learning rate."""
    d_sae: int = 1024
    """Latents."""
    steps: int = 200
    """Steps, rounded to whole passes over the training split."""
    batch_size: int = 512
    """Tokens per step."""
    threads: int | None = None
    """Threads; by default all."""
    out: Path | None = None
    """JSON file to write."""


def results(options: Options, cache: ActivationCache) -> Iterator[dict[str, Any]]:
    """One row per variant, L0 and learning rate."""
    names = options.variants or tuple(name for name, cls in VARIANTS.items() if issubclass(cls, PenaltySAE))
    epoch = cache.n_batches(options.batch_size, split="train", drop_last=True)
    config = TrainConfig(epochs=max(1, round(options.steps / epoch)), batch_size=options.batch_size)
    for name, l0, factor in itertools.product(names, options.l0, options.factors):
        torch.manual_seed(0)
        sae, clock = build(name, cache.d_in, options.d_sae, l0=l0), Clock()
        lr = factor * chosen_rate(sae, cache, config).value
        chosen = dataclasses.replace(config, lr=lr)
        steps = clock.time("train", lambda sae=sae, chosen=chosen: sum(1 for _ in train_steps(sae, cache, chosen)))
        assert isinstance(sae, PenaltySAE) and sae.control is not None and steps == n_steps(cache, chosen)
        measured = evaluate(sae, cache, config=EvaluateConfig(lm_tokens=0)).metrics
        held_out = measured["l0"].value
        yield {
            "variant": name,
            "factor": factor,
            "lr": lr,
            "steps": steps,
            "asked": l0,
            "trained": sae.control.trained.item(),
            "held_out": held_out,
            "off": held_out / l0 - 1,
            "fvu": measured["fvu"].value,
            "cpu_seconds": clock.total("train").cpu,
            "remarks": sae.remarks(),
        }


def planted(path: Path, rows: int = 60_000) -> ActivationCache:
    """The cache of a planted dictionary."""
    x, _ = Planted(64, 256, l0=8, zipf=0.5, noise=0.05, seed=1).sample(rows, seed=2)
    return ActivationCache.from_tensors(path, x, held_out=0.1)


def main(args: Sequence[str] | None = None) -> None:
    """Print the table, row by row."""
    options = command.options(Options, "l0", __doc__, args)
    console, rows = Console(highlight=False), []
    with tempfile.TemporaryDirectory() as folder:
        cache = planted(Path(folder) / "cache") if options.cache is None else ActivationCache(options.cache)
        console.print(f"{cache.path}: d_in {cache.d_in}, d_sae {options.d_sae}, batches of {options.batch_size}")
        console.print("variant    times auto     lr  steps   asked  trained  held-out     off     FVU  seconds")
        for row in results(options, cache):
            rows.append(row)
            console.print(
                f"{row['variant']:<10} {row['factor']:>10g} {row['lr']:>6.2g} {row['steps']:>6} {row['asked']:>7g} "
                f"{row['trained']:>8.2f} {row['held_out']:>9.2f} {row['off']:>+7.1%} {row['fvu']:>7.4f} "
                f"{row['cpu_seconds']:>8.1f}" + "".join(f"  {remark}" for remark in row["remarks"]),
                soft_wrap=True,
            )
    worst = max(rows, key=lambda row: abs(row["off"]))
    console.print(
        f"furthest off: {worst['off']:+.1%} ({worst['variant']}, l0 {worst['asked']:g}, {worst['factor']:g} times auto)"
    )
    write_out(options.out, rows)


if __name__ == "__main__":
    command.run(main)

"""``python -m saelab.bench.dead CACHE``: what the AuxK loss does for dead latents in its two forms.

``straight_through`` lets the gradient pass where a chosen latent is negative, ``rectified`` (the paper's form) does
not. Each form trains the same SAEs on the same batches, and both are measured on the held-out tokens of the cache and
as many training tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.data.cache import ActivationCache
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.sae import build
from saelab.training import TrainConfig, train

Form = Literal["rectified", "straight_through"]
FORMS: tuple[Form, Form] = ("rectified", "straight_through")


@dataclass(frozen=True)
class Settings:
    """What to train."""

    cache: Annotated[Path, tyro.conf.Positional]
    """Activation cache."""
    variants: tuple[str, ...] = ("topk", "batch_topk")
    """Variants with a budget k."""
    d_sae: int = 4608
    """Latents."""
    k: tuple[int, ...] = (16, 32)
    """Active latents per token."""
    seeds: int = 3
    """SAEs of each kind."""
    epochs: int = 1
    """Passes over the training split."""
    batch_size: int = 1024
    """Tokens per step."""
    dead_after: tuple[int, ...] = ()
    """Tokens without firing after which a latent is dead; several values are compared. By default the trainer's."""
    out: Path | None = None
    """JSON file to write."""


def results(settings: Settings, console: Console) -> Iterator[dict[str, Any]]:
    """One row per SAE."""
    cache = ActivationCache(settings.cache)
    jobs: list[tuple[str, int, int | None, int, Form]] = [
        (variant, k, limit, seed, form)
        for variant in settings.variants
        for k in settings.k
        for limit in settings.dead_after or (None,)
        for seed in range(settings.seeds)
        for form in FORMS
    ]
    for variant, k, limit, seed, form in track(jobs, "SAEs", console=console):
        torch.manual_seed(seed)
        sae = build(variant, cache.d_in, settings.d_sae, k=k)
        config = TrainConfig(epochs=settings.epochs, batch_size=settings.batch_size, dead_after=limit,
                             aux_gradient=form, seed=seed, data_seed=seed)  # fmt: skip
        started = time.process_time()
        train(sae, cache, config)
        seconds = time.process_time() - started
        metrics = evaluate(sae.eval(), cache, config=EvaluateConfig(lm_tokens=0)).metrics
        yield {"variant": variant, "k": k, "dead_after": limit, "seed": seed, "form": form, "seconds": seconds,
               "fvu": metrics["fvu"].value, "dead": metrics["dead_fraction"].value}  # fmt: skip


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print means over seeds, the range of the paired differences of FVU, and processor seconds."""
    settings = command.options(Settings, "dead", __doc__, args)
    console = Console(highlight=False)
    rows = list(results(settings, console))
    table = Table("variant", "k", "dead after", "dead %", "FVU", "difference", "seconds",
                  caption="rectified, straight-through")  # fmt: skip
    for variant, k, limit in dict.fromkeys((r["variant"], r["k"], r["dead_after"]) for r in rows):
        these = [r for r in rows if (r["variant"], r["k"], r["dead_after"]) == (variant, k, limit)]
        old, new = ([r for r in these if r["form"] == form] for form in FORMS)
        gaps = [b["fvu"] - a["fvu"] for a, b in zip(old, new)]
        table.add_row(
            variant, str(k), "default" if limit is None else f"{limit:,}", _pair(old, new, "dead", 100, 2),
            _pair(old, new, "fvu", 1, 4), f"{min(gaps):+.4f} to {max(gaps):+.4f}", _pair(old, new, "seconds", 1, 0),
        )  # fmt: skip
    console.print(table)
    write_out(settings.out, rows)
    return rows


def _pair(old: list[dict[str, Any]], new: list[dict[str, Any]], key: str, factor: float, digits: int) -> str:
    return ", ".join(f"{factor * np.mean([r[key] for r in each]):.{digits}f}" for each in (old, new))


if __name__ == "__main__":
    command.run(main)

"""How fast evaluation is: ``python -m saelab.bench.evaluation RUN --cache CACHE``.

Two ratios of time: the metrics without a language model to encoding alone, alternating batch by batch over the same
rows, so that a busy machine slows both alike; and a whole evaluation with cross-entropy and KL to its passes of the
language model, whose layers below the hook run once per context.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.evaluation.reconstruction import check_pair, context_of_rows, measure_batch
from saelab.metrics import FiringCounts, ReconstructionSums
from saelab.sae import SAE
from saelab.sae.weights import load_sae


@dataclass(frozen=True)
class Settings:
    """What to time."""

    run: tyro.conf.Positional[Path]
    """Run folder of the SAE."""
    cache: Path
    """Activation cache; its rows are read before the clock starts."""
    rows: int = 65_536
    """Rows that the metrics are timed on."""
    batch_size: int = 4096
    """Rows per batch."""
    lm_tokens: int = 50_000
    """Tokens of the whole evaluation; 0 leaves it out."""
    json: bool = False
    """Print JSON."""
    out: Path | None = None
    """JSON file to write."""


@torch.no_grad()
def metrics_ratio(sae: SAE, cache: ActivationCache, rows: int, batch_size: int) -> dict[str, float]:
    """Rows per second of encoding alone and of encoding, decoding and all metrics, and the median ratio of a turn.

    The ratio of processor time holds also where other programs compete for the cores.
    """
    rows = min(rows, cache.n_split("all"))
    if rows <= batch_size:
        raise UserError(f"{rows} rows are one batch of {batch_size}, which only warms up; give a smaller --batch-size")
    clusters = context_of_rows(cache, "all", rows)
    sums = ReconstructionSums(int(clusters[-1]) + 1, torch.tensor(cache.manifest.mean, dtype=torch.float64))
    firing = FiringCounts(sae.d_sae)
    clock, sizes = Clock(), []
    for start in range(0, rows, batch_size):
        x = cache.read(range(start, min(start + batch_size, rows))).acts
        own = clusters[start : start + batch_size]
        clock.time("encode", lambda x=x: sae.encode(x))
        clock.time("metrics", lambda x=x, own=own: measure_batch(sae, x, None, own, sums, firing))
        sizes.append(len(x))
        if not start:  # the first batch warms up
            clock.clear()
    ratio = clock.ratio("encode", "metrics")

    def speed(name: str) -> float:
        return statistics.median(n / seconds.wall for n, seconds in zip(sizes[1:], clock.times[name]))

    return {
        "encode_rows_per_second": speed("encode"),
        "metrics_rows_per_second": speed("metrics"),
        "metrics_to_encode": ratio.wall,
        "metrics_to_encode_processor": ratio.cpu,
    }


def whole_ratio(sae: SAE, cache: ActivationCache, model: Any, tokens: int) -> dict[str, float]:
    """Seconds of an evaluation with cross-entropy and KL on ``tokens`` rows, and their ratio to those in the model."""
    config = EvaluateConfig(split="all", max_tokens=tokens, lm_tokens=tokens)
    timing = evaluate(sae, cache, model, config).timing
    return {name: timing[name] for name in ("seconds", "seconds_language_model", "ratio_to_language_model")}


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = command.options(Settings, "evaluation", __doc__, args)
    console = Console(highlight=False)
    sae, cache = load_sae(settings.run), ActivationCache(settings.cache)
    check_pair(sae, cache, "all")
    found = metrics_ratio(sae, cache, settings.rows, settings.batch_size)
    if settings.lm_tokens:
        from saelab.lm.record import ModelRecord, load_recorded

        model = load_recorded(ModelRecord.from_manifest(cache.manifest), str(cache.path))
        found |= whole_ratio(sae, cache, model, settings.lm_tokens)
    write_out(settings.out, found)
    if settings.json:
        console.print_json(data=found)
        return
    console.print(f"{sae.variant}, d_in {sae.d_in}, d_sae {sae.d_sae}, {torch.get_num_threads()} threads")
    goals = {"metrics_to_encode": "at least 0.8", "ratio_to_language_model": "at most 1.3"}
    for name, value in found.items():
        console.print(f"{name:<28} {value:>12,.3f}   {goals.get(name, '')}".rstrip())


if __name__ == "__main__":
    command.run(main)

"""``python -m saelab.bench.encoder_start CACHE``: how long an encoder should be when training starts.

Encoders begin as the decoder's transpose times a number: ``saelab.sae.jump_relu.ENCODER_START`` for ``jump_relu`` and 1
for other variants. Each number trains the same SAEs on the same batches at the default learning rate, or a multiple of
it (``--factor``); all are measured on the held-out tokens of the cache and as many training tokens. ``--options`` sets
what else matters at the start: ``--variants jump_relu --options bandwidth=0.001 penalty_warmup=0.1``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.sae import VARIANTS, LinearSAE, build
from saelab.training import TrainConfig, chosen_rate, train


@dataclass(frozen=True)
class Settings:
    """What to train."""

    cache: Annotated[Path, tyro.conf.Positional]
    """Activation cache."""
    variants: tuple[str, ...] = ("jump_relu", "gated", "relu", "topk", "batch_topk")
    """Variants with an encoder that can be asked for an L0 or a k."""
    starts: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)
    """Multiples of the decoder's transpose."""
    d_sae: int = 2304
    """Latents."""
    l0: float = 32
    """Active latents per token."""
    options: tuple[str, ...] = ()
    """Options of all variants, name=value, the value in JSON (0.1, true)."""
    factor: float = 1
    """Multiple of the default learning rate."""
    b_dec_at_zero: bool = False
    """Let b_dec begin at zero, not at the centre of the activations."""
    seeds: int = 1
    """SAEs of each kind."""
    epochs: int = 1
    """Passes over the training split."""
    batch_size: int = 2048
    """Tokens per step."""
    threads: int | None = None
    """Threads; by default all."""
    out: Path | None = None
    """JSON file to write."""


def results(settings: Settings, console: Console) -> Iterator[dict[str, Any]]:
    """One row per SAE."""
    cache, options = ActivationCache(settings.cache), dict(map(_option, settings.options))
    jobs = [*itertools.product(settings.variants, settings.starts, range(settings.seeds))]
    for variant, start, seed in track(jobs, "SAEs", console=console):
        torch.manual_seed(seed)
        option = VARIANTS[variant].l0_option
        sae = build(
            variant,
            cache.d_in,
            settings.d_sae,
            **{option: settings.l0 if option == "l0" else int(settings.l0)} | options,
        )
        assert isinstance(sae, LinearSAE)
        begin_at(sae, start, settings.b_dec_at_zero)
        config = TrainConfig(epochs=settings.epochs, batch_size=settings.batch_size, seed=seed, data_seed=seed)
        train(sae, cache, replace(config, lr=settings.factor * chosen_rate(sae, cache, config).value))
        metrics = evaluate(sae.eval(), cache, config=EvaluateConfig(lm_tokens=0)).metrics
        yield {
            "variant": variant,
            "start": start,
            "seed": seed,
            **{name: metrics[name].value for name in ("fvu", "l0", "dead_fraction")},
        }


def begin_at(sae: LinearSAE, start: float | None, b_dec_at_zero: bool) -> None:
    """Have the encoder begin as the decoder's transpose times ``start``, if given, and b_dec at zero, if asked for."""
    if start is not None:
        with torch.no_grad():
            sae.W_enc.copy_(start * sae.W_dec.T)
    if b_dec_at_zero:
        initialise = sae.initialise
        sae.initialise = lambda x, b_dec: initialise(x, torch.zeros_like(b_dec))


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise UserError(f"--options {text} is not name=value with a number, true or false") from error


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print means over seeds."""
    settings = command.options(Settings, "encoder_start", __doc__, args)
    for variant in settings.variants:
        if not issubclass(VARIANTS[variant], LinearSAE):
            raise UserError(f"--variants {variant} has no encoder of its own; leave it out")
    console = Console(highlight=False)
    rows = list(results(settings, console))
    table = Table("variant", "start", "FVU", "dead %", "L0")
    for variant, start in itertools.product(settings.variants, settings.starts):
        these = [r for r in rows if (r["variant"], r["start"]) == (variant, start)]
        fvu, dead, l0 = (math.fsum(r[name] for r in these) / len(these) for name in ("fvu", "dead_fraction", "l0"))
        table.add_row(variant, f"{start:g}", f"{fvu:.4f}", f"{100 * dead:.1f}", f"{l0:.2f}")
    console.print(table)
    write_out(settings.out, rows)
    return rows


if __name__ == "__main__":
    command.run(main)

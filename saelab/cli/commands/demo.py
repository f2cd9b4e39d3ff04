"""``saelab demo``: the whole chain, from text to an SAE to browse, by calling the other commands."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from saelab.cli.console import console, out, parse
from saelab.data.cache import ActivationCache
from saelab.layout import CONFIG, EVALUATION, FEATURES, INDEX, MANIFEST


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the demonstration."""

    out: Path = Path("demo")
    """Folder for the cache and the runs; finished stages found there are skipped."""
    model: str = "smollm2"
    """Language model: `smollm2`, a hub id or a local folder."""
    hook: str = "blocks.9.hook_resid_post"
    """Hook point whose activations are cached."""
    text: str = "wiki-sample"
    """Text: `wiki-sample`, a `datasets` name, or a local file."""
    tokens: int = 200_000
    """Tokens to harvest."""
    d_sae: int = 4608
    """Latents."""
    k: int = 32
    """Latents per token."""
    epochs: int = 10
    """Passes over the cache in training."""
    device: str = "auto"
    """Where all of it runs: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of the demonstration, and the file whose existence shows that it has finished."""

    title: str
    command: str
    args: list[str]
    product: Path


def main(args: Sequence[str]) -> None:
    """Run every stage whose output is missing, and print the next commands."""
    options = parse(
        Options,
        "demo",
        args,
        "Do everything once: harvest activations, train an SAE, measure it, and index its features.",
    )
    started = time.perf_counter()
    for number, stage in enumerate(stages(options), start=1):
        if stage.product.exists():
            console.print(f"[bold]{number}. {stage.title}[/]: found {escape(str(stage.product))}")
            continue
        console.print(f"[bold]{number}. {stage.title}[/]\n   saelab {stage.command} {escape(' '.join(stage.args))}")
        importlib.import_module(f"saelab.cli.commands.{stage.command}").main(stage.args)
    minutes = (time.perf_counter() - started) / 60
    rows = ActivationCache(options.out / "cache").n_rows
    out.print(
        f"\ndone in {minutes:.1f} minutes: {rows:,} activations of {options.model}, one SAE, its features.",
        markup=False,
    )
    out.print(f"explore:  saelab app {options.out}", markup=False)
    out.print(
        f"steer:    saelab steer {options.out / 'topk'} --latent 12 --prompt 'The weather today'",
        markup=False,
    )


def stages(options: Options) -> list[Stage]:
    """The commands, in order."""
    cache, run = options.out / "cache", options.out / "topk"
    device = ["--device", options.device]
    source = ["--model", options.model, "--hook", options.hook, "--text", options.text]
    size = ["--d-sae", str(options.d_sae), "--k", str(options.k), "--epochs", str(options.epochs)]
    harvest = [*source, "--tokens", str(options.tokens), "--out", str(cache), "--resume", *device]
    train = [str(cache), "--variant", "topk", *size, "--out", str(run), "--resume", *device]
    return [
        Stage("cache the activations", "harvest", harvest, cache / MANIFEST),
        Stage("train a TopK SAE", "train", train, run / CONFIG),
        Stage("evaluate it", "evaluate", [str(run), "--cache", str(cache), *device], run / EVALUATION),
        Stage("index its features", "index", [str(run), "--cache", str(cache), *device], run / INDEX / FEATURES),
    ]

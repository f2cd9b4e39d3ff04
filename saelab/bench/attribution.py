"""``python -m saelab.bench.attribution``: how long the attribution of a prompt takes, and what its parts take.

By default of an untrained SAE at each of three places: the time depends on sizes, not on what latents mean. The kinds
take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from saelab.attribution import attribute
from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.runs import Run
from saelab.sae import build

PROMPT = "The first thing to know about the history of the city is that it was built on the banks of a river"
KINDS: dict[str, dict[str, int]] = {"as by default": {}, "without checks": {"check": 0}, "32 nodes": {"max_nodes": 32}}


@dataclass(frozen=True)
class Settings:
    """What to time."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders of SAEs; untrained ones by default."""
    model: str = "smollm2"
    """Language model."""
    layers: tuple[int, ...] = (3, 9, 15)
    """Blocks whose outputs the untrained SAEs explain."""
    d_sae: int = 4608
    """Their latents."""
    k: int = 32
    """Their latents per token."""
    tokens: int = 63
    """Length of the prompt; a sentence is repeated up to it."""
    rounds: int = 3
    """Rounds after the first, which does not count."""
    out: Path | None = None
    """JSON file to write."""


def main(args: Sequence[str] | None = None) -> None:
    """Load the model, measure, print."""
    from saelab.lm import load_model

    settings = command.options(Settings, "attribution", __doc__, args)
    found = measure(load_model(settings.model), settings)
    sys.stdout.write(
        f"{settings.tokens} tokens, {torch.get_num_threads()} threads, median of {settings.rounds} rounds\n"
    )
    for name, (wall, cpu) in found.items():
        sys.stdout.write(f"  {name:<16}{wall:8.2f} s, {cpu:8.2f} s of processor time\n")
    write_out(settings.out, found)


def measure(model: torch.nn.Module, settings: Settings) -> dict[str, tuple[float, float]]:
    """Seconds by kind: wall time and processor time."""
    tokenizer = model.tokenizer
    ids = tokenizer(" ".join([PROMPT] * (1 + settings.tokens // 10)))["input_ids"][: settings.tokens]  # pyright: ignore
    prompt = tokenizer.decode(ids)  # pyright: ignore
    runs = list(settings.runs) or [untrained(layer, model.cfg.d_model, settings) for layer in settings.layers]  # pyright: ignore
    clock = Clock()
    jobs = {
        name: lambda options=options: attribute(runs, prompt, model=model, any_weights=True, **options)
        for name, options in KINDS.items()
    }
    clock.rounds(jobs, settings.rounds)
    return {name: tuple(clock.median(name)) for name in jobs}  # pyright: ignore


def untrained(layer: int, d_in: int, settings: Settings) -> Run:
    """An SAE with random directions at the output of a block."""
    torch.manual_seed(layer)
    return Run(build("topk", d_in=d_in, d_sae=settings.d_sae, k=settings.k).eval(), f"blocks.{layer}.hook_resid_post")


if __name__ == "__main__":
    command.run(main)

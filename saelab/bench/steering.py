"""``python -m saelab.bench.steering``: the speed of generation with steering, relative to without.

The kinds of steering take turns, so that a busy machine slows them alike; the ratio of a kind is the median over
rounds of its rate divided by the unsteered rate of the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.lm.tokens import tokenize
from saelab.runs import Run
from saelab.sae import build
from saelab.steering.generation import generate_tokens
from saelab.steering.interventions import Intervention
from saelab.steering.operations import Add, Clamp, Scale
from saelab.steering.vectors import SteeringVector

PROMPT = "The first thing to know about the history of the city is that"


@dataclass(frozen=True)
class Settings:
    """What to time."""

    model: str = "smollm2"
    """Language model."""
    layer: int = 9
    """Block whose output is steered."""
    d_sae: int = 16384
    """Latents of the SAE in the loop."""
    k: int = 32
    """Latents per token."""
    tokens: int = 32
    """Tokens per generation."""
    rounds: int = 7
    """Rounds; each times every kind once."""
    json: bool = False
    """Print JSON."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Speed:
    """One kind of steering."""

    name: str
    tokens_per_second: float
    ratio: float  # of the unsteered rate
    floor: float  # what it must keep


def kinds(layer: int, d_in: int, d_sae: int, k: int) -> dict[str, tuple[Sequence[Intervention], float]]:
    """The kinds of steering and the share of the speed each must keep."""
    torch.manual_seed(0)
    hook_name = f"blocks.{layer}.hook_resid_post"
    run = Run(build("topk", d_in=d_in, d_sae=d_sae, k=k).eval(), hook_name)
    signed = Run(build("abs_topk", d_in=d_in, d_sae=d_sae, k=k).eval(), hook_name)
    vector = SteeringVector.from_latent(run, 0)
    return {
        "unsteered": ((), 1.0),
        "add": ([Add(vector, 5.0)], 0.9),
        "add, generated only": ([Add(vector, 5.0, where="generated")], 0.9),
        "clamp, topk": ([Clamp(run, 0, 5.0)], 0.75),
        "scale, abs_topk": ([Scale(signed, 0, 2.0)], 0.75),
    }


def measure(model: nn.Module, ids: torch.Tensor, settings: Settings, d_in: int) -> list[Speed]:
    """Time every kind in turns."""
    steering = kinds(settings.layer, d_in, settings.d_sae, settings.k)
    clock = Clock()

    def job(interventions: Sequence[Intervention]) -> Callable[[], object]:
        return lambda: generate_tokens(model, ids, None, interventions, max_new_tokens=settings.tokens)

    clock.rounds({name: job(interventions) for name, (interventions, _) in steering.items()}, settings.rounds)
    return [
        Speed(name, settings.tokens / clock.median(name).wall, clock.ratio("unsteered", name).wall, floor)
        for name, (_, floor) in steering.items()
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Load the model, measure, print."""
    from saelab.lm import load_model

    settings = command.options(Settings, "steering", __doc__, args)
    model: Any = load_model(settings.model)
    ids, _ = tokenize(model.tokenizer, PROMPT)
    speeds = measure(model, ids, settings, model.cfg.d_model)
    console = Console(highlight=False)
    used = {name: value for name, value in asdict(settings).items() if name != "out"}
    found = {"settings": used, "speeds": [asdict(speed) for speed in speeds]}
    write_out(settings.out, found)
    if settings.json:
        console.print_json(data=found)
        return
    table = Table(
        "steering", "tokens/s", "of unsteered", "must keep", title=f"{settings.model}, d_sae {settings.d_sae}"
    )
    for speed in speeds:
        table.add_row(speed.name, f"{speed.tokens_per_second:.1f}", f"{speed.ratio:.2f}", f"{speed.floor:.2f}")
    console.print(table)


if __name__ == "__main__":
    command.run(main)

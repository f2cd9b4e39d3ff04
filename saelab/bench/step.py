"""``python -m saelab.bench.step``: what the trainer adds to forward, backward and Adam, and what dead latents add.

The steps take turns on one batch. A tenth of the latents, chosen at random, stands in for dead ones: the AuxK loss is
computed on them whether they fire or not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab import kernels
from saelab.bench import command
from saelab.bench.kernels import steps
from saelab.bench.timing import Clock, write_out
from saelab.data.cache import Batch
from saelab.sae import build
from saelab.training import TrainConfig, TrainState, train_step
from saelab.training.state import make_optimizer

BARE = "forward, backward and Adam"


@dataclass(frozen=True)
class Settings:
    """What to time."""

    shape: tuple[str, ...] = ("2048x576x16384x32",)
    """n x d_in x d_sae x k."""
    rounds: int = 9
    """Rounds after the first, which does not count."""
    out: Path | None = None
    """JSON file to write."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = command.options(Settings, "step", __doc__, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.stdout.write(f"{kernels.describe()}\n")
    result = {shape: _report(shape, settings.rounds, device) for shape in settings.shape}
    write_out(settings.out, {"backend": kernels.describe(), "shapes": result})


def _report(shape: str, rounds: int, device: str) -> dict[str, dict[str, float]]:
    n, d_in, d_sae, k = command.shape_of(shape)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(1)).to(device)
    clock = Clock(wait=torch.cuda.synchronize if device == "cuda" else lambda: None)
    jobs: dict[str, Callable[[], object]] = {
        BARE: steps.ours(steps.Parameters(d_in, d_sae, device), x, k),
        "trainer's step": trainer_step(x, d_sae, k, 0.0),
        "trainer's step, 1 % dead": trainer_step(x, d_sae, k, 0.01),
        "trainer's step, 10 % dead": trainer_step(x, d_sae, k, 0.1),
        "the same, straight-through": trainer_step(x, d_sae, k, 0.1, aux_gradient="straight_through"),
    }
    clock.rounds(jobs, rounds)
    sys.stdout.write(f"n={n} d_in={d_in} d_sae={d_sae} k={k}, processor time, median of {rounds} rounds\n")
    report = {}
    for name in jobs:
        report[name] = {"milliseconds": 1e3 * clock.median(name).cpu, "ratio": clock.ratio(name, BARE).cpu}
        sys.stdout.write(f"  {name:<34}{report[name]['milliseconds']:9.1f} ms {report[name]['ratio']:7.3f}\n")
    return report


def trainer_step(
    x: torch.Tensor, d_sae: int, k: int, dead: float, variant: str = "topk", **config: Any
) -> Callable[[], object]:
    """A step of the trainer on the batch ``x``; AuxK runs on a share ``dead`` of the latents."""
    n, d_in = x.shape
    torch.manual_seed(0)
    sae = build(variant, d_in, d_sae, k=k).to(x.device).train()
    if dead:
        latents = torch.randperm(d_sae)[: round(dead * d_sae)].sort().values.to(x.device)
        sae.aux_latents = lambda _, weight: {"auxk": (weight, latents)}  # type: ignore[method-assign]
    k_aux = 2 ** round(torch.tensor(d_in / 2).log2().item())
    settings = TrainConfig(batch_size=n, lr=1e-4, k_aux=k_aux, dead_after=10**12, **config)
    since = torch.zeros(d_sae, dtype=torch.int64, device=x.device)
    state = TrainState(make_optimizer(sae), since, 1.0, float(d_in))
    batch = Batch(acts=x, grads=None, tokens=None, rows=None)  # type: ignore[arg-type]
    return lambda: train_step(sae, batch, settings, state, 10**6)


if __name__ == "__main__":
    command.run(main)

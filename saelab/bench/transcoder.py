"""``python -m saelab.bench.transcoder``: the step of a transcoder, without and with a skip connection, and of an SAE.

The steps take turns on one batch, and the ratios are those of processor time, turn by turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.data.cache import Batch
from saelab.sae import build
from saelab.training import TrainConfig, TrainState, train_step
from saelab.training.state import make_optimizer

KINDS: dict[str, dict[str, int | bool]] = {"SAE": {}, "transcoder": {}, "transcoder, --skip": {"skip": True}}


@dataclass(frozen=True)
class Settings:
    """What to time; the defaults are those of docs/benchmarks.md."""

    shape: tuple[str, ...] = ("2048x256x2048x32", "2048x576x4608x32")
    """n x width x latents x k."""
    variant: str = "topk"
    """Variant of the SAE."""
    rounds: int = 9
    """Rounds after the first, which does not count."""
    threads: int | None = None
    """CPU threads; all by default."""
    out: Path | None = None
    """JSON file to write."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = command.options(Settings, "transcoder", __doc__, args)
    found = {shape: measure(shape, settings) for shape in settings.shape}
    for shape, ratios in found.items():
        sys.stdout.write(f"{shape}, {torch.get_num_threads()} threads, processor time, median of {settings.rounds}\n")
        for name, (milliseconds, ratio) in ratios.items():
            sys.stdout.write(f"  {name:<20}{milliseconds:9.1f} ms {ratio:7.3f}\n")
    write_out(settings.out, found)


def measure(shape: str, settings: Settings) -> dict[str, tuple[float, float]]:
    """Milliseconds of processor time, and their ratio to the SAE's, by name."""
    n, width, d_sae, k = command.shape_of(shape)
    generator = torch.Generator().manual_seed(0)
    acts, target = (torch.randn(n, width, generator=generator) for _ in range(2))
    clock = Clock()
    jobs = {}
    for name, options in KINDS.items():
        written = None if name == "SAE" else target
        jobs[name] = step(acts, written, settings.variant, d_sae, k=k, **options)
    clock.rounds(jobs, settings.rounds)
    return {name: (1e3 * clock.median(name).cpu, clock.ratio(name, "SAE").cpu) for name in jobs}


def step(acts: torch.Tensor, target: torch.Tensor | None, variant: str, d_sae: int, **options: int) -> Callable:
    """A step of the trainer on one batch; no latent counts as dead."""
    n, width = acts.shape
    torch.manual_seed(0)
    d_out = {} if target is None else {"d_out": target.shape[1]}
    sae = build(variant, width, d_sae, **d_out, **options).train()
    since = torch.zeros(d_sae, dtype=torch.int64)
    state = TrainState(make_optimizer(sae), since, 1.0, float(width), target_scale=None if target is None else 1.0)
    batch = Batch(acts=acts, grads=None, tokens=None, rows=None, target=target)  # pyright: ignore[reportArgumentType]
    settings = TrainConfig(batch_size=n, lr=1e-4, k_aux=width // 2, dead_after=10**12)
    return lambda: train_step(sae, batch, settings, state, 10**6)


if __name__ == "__main__":
    command.run(main)

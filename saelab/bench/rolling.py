"""Does a rolling cache cost more than its parts? ``python -m saelab.bench.rolling`` harvests and trains both ways.

One way is a rolling cache. The other is a harvest of the same number of forward passes into an ordinary cache, and then
a training of as many steps on it. They take turns in one process, so that a busy machine slows both. On one device the
parts add up, so the ratio of processor times says what rolling costs; where the model and the training have a device
each, the slower part is the measure, in wall time.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from saelab.bench import command
from saelab.bench.timing import Clock, Seconds, write_out
from saelab.data.cache import ActivationCache
from saelab.devices import pick_device
from saelab.harvesting import HarvestConfig, harvest
from saelab.harvesting.rolling import RollingConfig, roll
from saelab.lm.loading import load_model
from saelab.sae import build
from saelab.training import TrainConfig, train


@dataclass(frozen=True)
class Options:
    """Sizes of the comparison; the defaults are those of docs/benchmarks.md."""

    model: str = "smollm2"
    """Language model."""
    hook: str = "blocks.9.hook_resid_post"
    """Hook point."""
    text: str = "wiki-sample"
    """Text."""
    tokens: int = 60_000
    """Activations to train on."""
    window_tokens: int = 8192
    """Tokens of a segment."""
    cache_gb: float = 0.2
    """Limit of the rolling cache."""
    context_length: int = 128
    """Tokens of a context."""
    batch_size: int = 2048
    """Tokens per step."""
    d_sae: int = 4608
    """Latents."""
    k: int = 32
    """Active latents per token."""
    device: str = "cpu"
    """Where the SAE is trained."""
    model_device: str | None = None
    """Where the model runs; by default where the SAE is trained."""
    rounds: int = 3
    """Turns."""
    threads: int | None = None
    """Threads; by default all."""
    out: Path | None = None
    """JSON file to write."""


class Comparison:
    """Both ways, in a folder."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        device = pick_device(options.device)
        self.device = device
        self.model = load_model(options.model, device=options.model_device or device)
        self.config = RollingConfig(
            tokens=options.tokens,
            cache_gb=options.cache_gb,
            window_tokens=options.window_tokens,
            context_length=options.context_length,
            sample_tokens=options.window_tokens,
            held_out_tokens=options.window_tokens,
        )
        self.clock, self.text_tokens = Clock(self._wait), 0

    def _wait(self) -> None:
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)

    def rolling(self) -> None:
        """Both at once. The first time tells how much text that takes."""
        folder = self.folder / "rolling"
        shutil.rmtree(folder, ignore_errors=True)
        with roll(self.model, self.options.hook, self.options.text, folder, self.config) as cache:
            self._train(cache)
            passes = sum(segment.passes for segment in cache.record.segments) + sum(cache.config.kept_passes())
            self.text_tokens = passes * cache.config.pass_size

    def harvest(self) -> None:
        """The same number of forward passes, into an ordinary cache."""
        kept = {field.name for field in dataclasses.fields(HarvestConfig)} - {"held_out"}
        own: dict[str, Any] = {name: getattr(self.config, name) for name in kept} | {"tokens": self.text_tokens}
        config, folder = HarvestConfig(**own), self.folder / "cache"
        harvest(self.model, self.options.hook, self.options.text, folder, config, overwrite=True)

    def train(self) -> None:
        """As many steps on that cache."""
        self._train(ActivationCache(self.folder / "cache").with_validation_from(self.options.tokens))

    def _train(self, cache: ActivationCache) -> None:
        torch.manual_seed(0)
        sae = build("topk", d_in=cache.d_in, d_sae=self.options.d_sae, k=self.options.k).to(self.device)
        train(sae, cache, TrainConfig(epochs=1, batch_size=self.options.batch_size))

    def run(self) -> dict[str, Any]:
        """Take turns, and return the medians."""
        jobs = {"rolling": self.rolling, "harvest": self.harvest, "train": self.train}
        self.clock.rounds(jobs, self.options.rounds)
        found = {name: self.clock.median(name) for name in jobs}
        parts = Seconds(*map(sum, zip(found["harvest"], found["train"])))
        slower = max(found["harvest"].wall, found["train"].wall)
        return {
            "seconds": {name: {"wall": time.wall, "processor": time.cpu} for name, time in found.items()},
            "ratios": {
                "sum of the parts over rolling, processor time": parts.cpu / found["rolling"].cpu,
                "sum of the parts over rolling, wall time": parts.wall / found["rolling"].wall,
                "slower part over rolling, wall time": slower / found["rolling"].wall,
            },
            "tokens/s of rolling": self.options.tokens / found["rolling"].wall,
            "segments": -(-self.options.tokens // self.options.window_tokens),
            "threads": torch.get_num_threads(),
        }


def main(args: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    options = command.options(Options, "rolling", __doc__, args)
    with tempfile.TemporaryDirectory() as folder:
        found = Comparison(options, Path(folder)).run()
    console = Console(highlight=False)
    for name, seconds in found["seconds"].items():
        console.print(f"{name:<8} {seconds['wall']:8.2f} s wall {seconds['processor']:8.2f} s processor")
    for name, ratio in found["ratios"].items():
        console.print(f"{name}: {ratio:.3f}")
    console.print(f"{found['tokens/s of rolling']:,.0f} tokens/s in {found['segments']} segments")
    write_out(options.out, found)


if __name__ == "__main__":
    command.run(main)

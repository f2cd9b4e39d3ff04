"""Speed of harvest compared with the plain Hugging Face model: ``python -m saelab.bench.harvest``.

After every forward pass of a harvest (tokenising, capturing, rounding, checksums and files included) the plain model,
cut off after the hooked layer, with PyTorch's fused attention, runs on as many tokens. Both see the same noise of
the machine, so their ratio is meaningful where their speeds are not; the ratio of processor time holds even where
other programs compete for the cores.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab.bench import command
from saelab.bench.timing import Clock, Seconds, write_out
from saelab.errors import UserError
from saelab.harvesting.background import Background
from saelab.harvesting.config import HarvestConfig
from saelab.harvesting.pipeline import harvest
from saelab.lm.loading import load_model
from saelab.lm.sites import locate
from saelab.lm.smollm2 import quiet_progress


def truncated_model(folder: str, n_layers: int) -> Any:
    """The model up to and including its layer ``n_layers - 1``, without the output head."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = n_layers
    with quiet_progress():
        return AutoModel.from_pretrained(folder, config=config).eval()


def compare(model_name: str, layer: int, text: str, tokens: int, context_length: int) -> dict[str, float]:
    """Tokens per second of harvest and of the plain model, and how they compare (above 1: harvest is faster)."""
    bridge = load_model(model_name, device="cpu")
    hook = locate(bridge, f"blocks.{layer}.hook_resid_post").hook_name
    plain = truncated_model(str(bridge.cfg.model_name), layer + 1)
    config = HarvestConfig(tokens=tokens, context_length=context_length)
    inputs = torch.randint(0, bridge.cfg.d_vocab, (config.pass_contexts, context_length))
    clock = Clock()
    last: Seconds | None = None

    @torch.no_grad()
    def interleave(done: int, total: int) -> None:
        nonlocal last
        for background in Background.active:
            # What follows a pass counts for harvest, and must not run beside the other.
            background.drain()
        if last is not None:
            clock.add("harvest", Seconds.now().since(last))
        clock.time("plain", lambda: plain(input_ids=inputs, use_cache=False))
        last = Seconds.now()

    with tempfile.TemporaryDirectory() as folder:
        harvest(bridge, hook, text, Path(folder) / "cache", config, progress=interleave)
        assert last is not None  # a harvest makes at least one pass
        end = Seconds.now().since(last).wall  # the last shard, and the statistics
    passes = len(clock.times.get("harvest", []))
    if passes < 2:
        raise UserError(f"tokens={tokens} are too few for a comparison; give at least {3 * inputs.numel()}")
    # The first pass of either pays for warming up; the first of harvest also for opening everything.
    del clock.times["plain"][0]
    n, ours, theirs = inputs.numel(), clock.total("harvest"), clock.total("plain")
    return {
        "harvest tokens/s": n * passes / (ours.wall + end),
        "plain tokens/s": n * passes / theirs.wall,
        "ratio of median passes": clock.median("plain").wall / clock.median("harvest").wall,
        "ratio of processor time": theirs.cpu / ours.cpu,
        "passes": passes,
    }


@dataclass(frozen=True)
class Settings:
    """What to harvest."""

    model: str = "smollm2"
    """`smollm2`, a hub id or a folder."""
    layer: int = 9
    """Harvest the residual stream after this layer."""
    text: str = "wiki-sample"
    """Text source."""
    tokens: int = 40_000
    """Tokens to harvest."""
    context_length: int = 128
    """Tokens per context."""
    out: Path | None = None
    """JSON file to write."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = command.options(Settings, "harvest", __doc__, args)
    found = compare(settings.model, settings.layer, settings.text, settings.tokens, settings.context_length)
    for name, value in found.items():
        sys.stdout.write(f"{name:<24} {value:.3f}\n" if value < 10 else f"{name:<24} {value:,.0f}\n")
    write_out(settings.out, found)


if __name__ == "__main__":
    command.run(main)

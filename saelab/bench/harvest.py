"""How fast harvest is beside the plain Hugging Face model: ``python -m saelab.bench.harvest``.

After every forward pass of a harvest (tokenising, capturing, rounding, checksums and files included) the plain model,
cut off after the hooked layer, with PyTorch's fused attention, runs on as many tokens. Both see the same noise of
the machine, so their ratio is meaningful where their speeds are not; the ratio of processor time holds even where
other programs compete for the cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from saelab.errors import UserError
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
        return AutoModel.from_pretrained(folder, config=config, attn_implementation="sdpa").eval()


def compare(model_name: str, layer: int, text: str, tokens: int, context_length: int) -> dict[str, float]:
    """Tokens per second of harvest and of the plain model, and how they compare (above 1: harvest is faster)."""
    bridge = load_model(model_name, device="cpu")
    hook = locate(bridge, f"blocks.{layer}.hook_resid_post").hook_name
    plain = truncated_model(str(bridge.cfg.model_name), layer + 1)
    config = HarvestConfig(tokens=tokens, context_length=context_length)
    inputs = torch.randint(0, bridge.cfg.d_vocab, (config.pass_contexts, context_length))
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    last: tuple[float, float] | None = None

    @torch.no_grad()
    def interleave(done: int, total: int) -> None:
        nonlocal last
        now = clocks()
        if last:
            ours.append((now[0] - last[0], now[1] - last[1]))
        plain(input_ids=inputs, use_cache=False)
        last = clocks()
        theirs.append((last[0] - now[0], last[1] - now[1]))

    with tempfile.TemporaryDirectory() as folder:
        harvest(bridge, hook, text, Path(folder) / "cache", config, progress=interleave)
        assert last is not None  # a harvest makes at least one pass
        end = clocks()[0] - last[0]  # the last shard, and the statistics
    if len(ours) < 2:
        raise UserError(f"tokens={tokens} are too few for a comparison; give at least {3 * inputs.numel()}")
    # The first pass of either pays for warming up; the first of harvest also for opening everything.
    n, passes = inputs.numel(), len(ours)
    (wall, cpu), (plain_wall, plain_cpu) = (list(zip(*found)) for found in (ours, theirs[1:]))
    return {
        "harvest tokens/s": n * passes / (sum(wall) + end),
        "plain tokens/s": n * passes / sum(plain_wall),
        "ratio of median passes": statistics.median(plain_wall) / statistics.median(wall),
        "ratio of processor time": sum(plain_cpu) / sum(cpu),
        "passes": passes,
    }


def clocks() -> tuple[float, float]:
    """Seconds, and seconds of processor time over all threads."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m saelab.bench.harvest", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, hub id or folder")
    parser.add_argument("--layer", type=int, default=9, help="harvest the residual stream after this layer")
    parser.add_argument("--text", default="wiki-sample", help="text source")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens to harvest")
    parser.add_argument("--context-length", type=int, default=128, help="tokens per context")
    options = parser.parse_args()
    try:
        found = compare(options.model, options.layer, options.text, options.tokens, options.context_length)
    except UserError as error:
        parser.error(str(error))
    for name, value in found.items():
        sys.stdout.write(f"{name:<24} {value:.3f}\n" if value < 10 else f"{name:<24} {value:,.0f}\n")


if __name__ == "__main__":
    main()

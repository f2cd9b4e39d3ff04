"""How fast harvest is beside the plain Hugging Face model: ``python -m saelab.lm.bench``.

After every forward pass of a harvest (tokenising, capturing, rounding, checksums and files included) the plain model,
cut off after the hooked layer, with PyTorch's fused attention, runs on as many tokens. Both see the same noise of
the machine, so their ratio is meaningful where their speeds are not.
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
from saelab.lm.config import HarvestConfig
from saelab.lm.harvest import harvest
from saelab.lm.hooks import find_hook
from saelab.lm.loading import load_model
from saelab.lm.smollm2 import quiet_progress


def truncated_model(folder: str, n_layers: int) -> Any:
    """The model up to and including its layer ``n_layers - 1``, without the output head."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = n_layers
    with quiet_progress():
        return AutoModel.from_pretrained(folder, config=config, attn_implementation="sdpa").eval()


def compare(model_name: str, layer: int, text: str, tokens: int, context_length: int) -> dict[str, float]:
    """Tokens per second of harvest and of the plain model, and the ratio of the medians over passes."""
    bridge = load_model(model_name, device="cpu")
    hook = find_hook(bridge, f"blocks.{layer}.hook_resid_post").hook_name
    plain = truncated_model(str(bridge.cfg.model_name), layer + 1)
    config = HarvestConfig(tokens=tokens, context_length=context_length)
    inputs = torch.randint(0, bridge.cfg.d_vocab, (config.pass_contexts, context_length))
    ours: list[float] = []
    theirs: list[float] = []
    last = 0.0

    @torch.no_grad()
    def interleave(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if last:
            ours.append(now - last)
        plain(input_ids=inputs, use_cache=False)
        last = time.perf_counter()
        theirs.append(last - now)

    with tempfile.TemporaryDirectory() as folder:
        harvest(bridge, hook, text, Path(folder) / "cache", config, progress=interleave)
        end = time.perf_counter() - last  # the last shard, and the statistics
    # The first pass of either pays for warming up; the first of harvest also for opening everything.
    n = inputs.numel()
    spent, plain_spent = sum(ours) + end, sum(theirs[1:])
    return {
        "harvest tokens/s": n * len(ours) / spent,
        "plain tokens/s": n * len(theirs[1:]) / plain_spent,
        "ratio of totals": plain_spent / len(theirs[1:]) * len(ours) / spent,
        "ratio of median passes": statistics.median(theirs[1:]) / statistics.median(ours),
        "passes": len(ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m saelab.lm.bench", description=__doc__)
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

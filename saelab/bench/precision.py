"""Which latents a bf16 selection changes: ``python -m saelab.bench.precision RUN ... --cache CACHE``.

On held-out tokens, each SAE selects as in training (budgets over a batch are spent on batches of ``--batch-size``) with
``--precision fp32`` and ``bf16``. ``rounded`` is what a bf16 product alone would select, without the spare candidates
whose pre-activations are computed in float32. Runs on any device; a CPU emulates the GPU's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from saelab import kernels
from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.data.cache import ActivationCache
from saelab.devices import pick_device
from saelab.evaluation.reconstruction import check_pair
from saelab.kernels import SelectedPreActs, candidates
from saelab.sae import LinearSAE
from saelab.sae.weights import load_sae


@dataclass(frozen=True)
class Settings:
    """What to compare."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    cache: Path
    """Activation cache of the same hook point."""
    tokens: int = 16_384
    """Held-out tokens."""
    batch_size: int = 2048
    """Tokens per batch."""
    device: str = "auto"
    """Where to compute."""
    out: Path | None = None
    """JSON file to write."""


def agreement(sae: LinearSAE, x: Tensor, grads: Tensor | None = None) -> dict[str, float]:
    """Shares of the tokens with the same set, and of the selected latents, of two precisions against float32."""
    exact = _keys(_selected(sae, x, grads, "fp32"), sae.d_sae)
    spare, candidates.surplus = candidates.surplus, lambda count, most: count
    try:
        rounded = _keys(_selected(sae, x, grads, "bf16"), sae.d_sae)
    finally:
        candidates.surplus = spare
    found = {"latents_per_token": exact.numel() / len(x)}
    for name, keys in (("rounded", rounded), ("bf16", _keys(_selected(sae, x, grads, "bf16"), sae.d_sae))):
        changed = torch.cat([exact[~torch.isin(exact, keys)], keys[~torch.isin(keys, exact)]])
        found[f"{name}_tokens"] = 1 - (changed // sae.d_sae).unique().numel() / len(x)
        found[f"{name}_latents"] = torch.isin(exact, keys).float().mean().item()
    return found


def _selected(sae: LinearSAE, x: Tensor, grads: Tensor | None, precision: kernels.Precision) -> SelectedPreActs:
    with torch.no_grad(), kernels.use_precision(precision):
        return sae.select(x, grads)


def _keys(code: SelectedPreActs, d_sae: int) -> Tensor:
    """One number for each (token, latent)."""
    return torch.repeat_interleave(code.row_ptr.diff()) * d_sae + code.indices


def main(args: Sequence[str] | None = None) -> None:
    """Compare and print."""
    settings = command.options(Settings, "precision", __doc__, args)
    console, device, result = Console(highlight=False, soft_wrap=True), pick_device(settings.device), {}
    cache = ActivationCache(settings.cache)
    console.print(f"{'':<18} latents/token   same set: rounded     bf16   same latents: rounded      bf16")
    for run in settings.runs:
        sae = load_sae(run).to(device)
        if not isinstance(sae, LinearSAE) or (sae.needs_grads and not cache.has_grads):
            continue  # it selects in float32 whatever the precision, or not without gradients
        check_pair(sae, cache, "held_out")
        sae.train()
        batches = cache.head(settings.tokens, settings.batch_size, split="held_out", seed=0, grads=sae.needs_grads)
        found: list[dict[str, Any]] = [
            agreement(sae, batch.acts.to(device), None if batch.grads is None else batch.grads.to(device))
            for batch in batches
        ]
        mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        result[run.name] = mean
        console.print(
            f"{run.name:<18} {mean['latents_per_token']:>13.1f}   {mean['rounded_tokens']:>17.4f} "
            f"{mean['bf16_tokens']:>8.4f}   {mean['rounded_latents']:>21.6f} {mean['bf16_latents']:>9.6f}"
        )
    write_out(settings.out, result)


if __name__ == "__main__":
    command.run(main)

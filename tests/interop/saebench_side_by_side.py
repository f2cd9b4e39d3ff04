"""Measure one SAE with SAEBench's core evaluation and with saelab, on the cache's model and text.

    .venv-interop/bin/python -m tests.interop.saebench_side_by_side demo/topk --cache demo/cache

Both read the held-out part of the text. saelab's numbers are those of ``evaluation.json``; SAEBench cuts the same text
into contexts of its own and measures the first position of each as well, and its formulas are its own: l0, cosine and
losses mean the same in both, explained_variance and mse do not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from saelab import load_model
from saelab.data.cache import ActivationCache
from saelab.interop.saebench import as_base_sae, core
from saelab.sae.weights import load_sae

# saelab's name, and where SAEBench keeps its own.
PAIRS = {
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
    "cosine": ("reconstruction_quality", "cossim"),
    "mse": ("reconstruction_quality", "mse"),
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "l2_ratio": ("shrinkage", "l2_ratio"),
    "ce_loss_without_sae": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_loss_with_sae": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_loss_with_zero_ablation": ("model_performance_preservation", "ce_loss_with_ablation"),
    "ce_loss_recovered_zero": ("model_performance_preservation", "ce_loss_score"),
    "kl_div_with_sae": ("model_behavior_preservation", "kl_div_with_sae"),
}


def compare(run: Path, cache: ActivationCache, batches: int) -> list[tuple[str, float | None, float | None]]:
    """(name, saelab, SAEBench) for every quantity that both measure."""
    manifest, model = cache.manifest, load_model(cache.manifest.model)
    tokens = [token for batch in cache.batches(4096, split="held_out", seed=None) for token in batch.tokens.tolist()]
    adapter = as_base_sae(load_sae(run), manifest.model, cache.hook_name, context_size=manifest.context_length)
    with tempfile.TemporaryDirectory() as folder:
        text = model.tokenizer.decode(tokens)
        (Path(folder) / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
        theirs = core(adapter, model, folder, n_reconstruction_batches=batches)
    ours = json.loads((run / "evaluation.json").read_text())["metrics"]
    return [(name, _value(ours.get(name)), theirs.get(place[0], {}).get(place[1])) for name, place in PAIRS.items()]


def _value(metric: Any) -> float | None:
    return metric["value"] if isinstance(metric, dict) else metric


def main() -> None:
    """Print the two columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=8, help="of eight contexts each, for losses and reconstruction")
    options = parser.parse_args()
    rows = compare(options.run, ActivationCache(options.cache), options.batches)
    width = max(len(name) for name, *_ in rows)
    sys.stdout.write(f"{'':<{width}}  {'saelab':>10}  {'SAEBench':>10}\n")
    for name, *values in rows:
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        sys.stdout.write(f"{name:<{width}}  " + "  ".join(f"{cell:>10}" for cell in cells) + "\n")


if __name__ == "__main__":
    main()

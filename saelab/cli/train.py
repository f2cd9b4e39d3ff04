"""``saelab train``: one SAE on an activation cache, whatever the variant, with the variant's own options."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from saelab import checkpoint
from saelab.cli.common import console, out, parse, prepare_output, print_json, progress_bar
from saelab.cli.variants import option_fields, variant_in
from saelab.data.cache import ActivationCache
from saelab.sae import SAE, VARIANTS, build
from saelab.train import StepMetrics, TrainConfig, check, n_steps, train


@dataclasses.dataclass(frozen=True)
class Options:
    """Where to read, where to write, and which SAE."""

    cache: tyro.conf.Positional[Path]
    """Folder of the activation cache."""
    out: Path
    """Run folder to write."""
    variant: str = "topk"
    """Which SAE; the variant's own options are listed with it."""
    d_sae: int = 4608
    """Latents."""
    overwrite: bool = False
    """Replace an existing run folder."""
    json: bool = False
    """Print the final metrics as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Parse, train with a progress bar, save the run folder."""
    variant = variant_in(args)
    # The training options come after ours in the list of fields, so they are the first base.
    cls = dataclasses.make_dataclass("TrainOptions", option_fields(variant), bases=(TrainConfig, Options), frozen=True)
    options = parse(cls, "train", args, f"Train a {variant} SAE: {VARIANTS[variant].__doc__}")
    run(options, {name: getattr(options, name) for name, *_ in option_fields(variant)})


def run(options: Any, config: dict[str, Any]) -> StepMetrics:
    """Train as the options say; returns the last step's metrics."""
    prepare_output(options.out, options.overwrite)
    cache = ActivationCache(options.cache)
    torch.manual_seed(options.seed)
    sae = build(options.variant, d_in=cache.d_in, d_sae=options.d_sae, **config)
    train_config = TrainConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig)})
    train_config = train_config.resolved(sae, cache)
    check(sae, cache, train_config)
    last = fit(sae, cache, train_config, options.out)
    checkpoint.save_sae(sae, options.out, provenance(cache, train_config))
    if options.json:
        print_json(last.row())
    else:
        out.print(f"{options.variant}: FVU {last.fvu:.4f}, L0 {last.l0:.1f}, {last.dead} dead latents")
        out.print(f"saved to {options.out}")
    return last


def fit(sae: SAE, cache: ActivationCache, config: TrainConfig, folder: Path) -> StepMetrics:
    """Drive the training loop: a progress bar, and one line of ``metrics.jsonl`` per step."""
    total, last = n_steps(cache, config), None
    console.print(
        f"training {sae.variant}: d_in {sae.d_in}, d_sae {sae.d_sae}, {total} steps of {config.batch_size} tokens, "
        f"lr {config.lr:.2g}, dead after {config.dead_after} tokens"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as log, progress_bar("state") as bar:
        task = bar.add_task("train", total=total, state="")
        started = time.perf_counter()
        for last in train(sae, cache, config):
            log.write(json.dumps(last.row()) + "\n")
            speed = last.tokens / (time.perf_counter() - started)
            text = f"FVU {last.fvu:.3f}  L0 {last.l0:.0f}  dead {last.dead}  {speed:,.0f} tokens/s"
            bar.update(task, completed=last.step, state=text)
    assert last is not None  # check() refuses a run without a single step
    return last


def provenance(cache: ActivationCache, config: TrainConfig) -> dict[str, Any]:
    """What a run folder remembers of its data and its settings."""
    manifest = cache.manifest
    return {
        "model_name": manifest.model,
        "hook_name": manifest.hook_name,
        "hf_hook_name": manifest.hf_hook_name,
        "context_size": manifest.context_length,
        "prepend_bos": manifest.bos != "none",
        "dataset_path": manifest.text,
        "cache": str(cache.path),
        "cache_fingerprint": cache.fingerprint,
        "train": dataclasses.asdict(config),
    }

"""Evaluation of an SAE: on cached activations, and spliced into the running language model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation.reconstruction import Progress, check_pair, count_firing, reconstruction
from saelab.evaluation.report import Evaluation, fit_remark, l0_remark
from saelab.evaluation.same_model import check_same_model, plain_site
from saelab.evaluation.splice import Replace, SplicedRun
from saelab.evaluation.tasks.battery import TaskConfig, run_tasks
from saelab.sae import SAE

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "TaskConfig",
    "evaluate",
    "fit_remark",
    "l0_remark",
    "run_tasks",
    "spliced",
]


@dataclass(frozen=True)
class EvaluateConfig:
    """How much to evaluate. Counts are in tokens."""

    split: Literal["train", "held_out", "all"] = "held_out"
    """Rows of the cache to evaluate on; only the held-out ones are an honest test."""
    max_tokens: int | None = None
    """Rows for the metrics of reconstruction; by default the whole split."""
    lm_tokens: int = 8192
    """Tokens run through the language model for cross-entropy and KL; 0 leaves it out."""
    density_tokens: int = 100_000
    """Training rows added to the window in which dead and dense latents are counted."""
    batch_size: int = 4096
    """Tokens per batch."""
    use_gradients: bool = False
    """Let a gradient-aware SAE see the cached gradients of the loss. They contain the labels: an upper bound."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lm_tokens", "density_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")


def evaluate(
    sae: SAE,
    cache: ActivationCache,
    model: Any = None,
    config: EvaluateConfig | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure ``sae`` (in raw units, as :func:`saelab.sae.weights.load_sae` gives it) on a cache.

    ``model`` is the language model that the cache was harvested from, as :func:`saelab.load_model` gives it or as a
    plain Hugging Face causal model; without it, or with ``lm_tokens=0``, cross-entropy and KL are left out. The SAE is
    evaluated in eval mode.
    """
    config = config or EvaluateConfig()
    check_pair(sae, cache, config.split)
    started = time.perf_counter()
    with sae.evaluating():
        sums, firing = reconstruction(
            sae,
            cache,
            split=config.split,
            max_tokens=config.max_tokens,
            batch_size=config.batch_size,
            grads=config.use_gradients,
            progress=progress,
        )
        metrics = sums.estimates(seed=config.seed)
        seconds_offline = time.perf_counter() - started
        if config.split != "all":
            count_firing(sae, cache, firing, config.density_tokens, batch_size=config.batch_size, progress=progress)
        metrics |= firing.estimates()
        timing = {"seconds_reconstruction": seconds_offline}
        if model is not None and config.lm_tokens:
            run = spliced({"sae": sae}, cache, model, config, progress)
            metrics |= run.sums["sae"].estimates(seed=config.seed)
            timing |= _timing(run, time.perf_counter() - started)
    timing["seconds"] = time.perf_counter() - started
    return Evaluation(metrics, firing.histogram(), _settings(sae, cache, config, timing), timing)


def spliced(
    saes: Mapping[str, SAE],
    cache: ActivationCache,
    model: Any,
    config: EvaluateConfig,
    progress: Progress | None = None,
) -> SplicedRun:
    """Run the first ``lm_tokens`` tokens of the split, by whole contexts, with one SAE after the other spliced in."""
    manifest = cache.manifest

    def replacing(sae: SAE) -> Replace:
        def replace(x: Tensor, rows: Tensor) -> Tensor:
            grads = cache.read(rows, grads=True).grads if config.use_gradients else None
            return sae(x.to(sae.device), None if grads is None else grads.to(sae.device)).to(x.device)

        return replace

    plain, site = plain_site(model, cache)
    mean = torch.tensor(manifest.mean, dtype=torch.float32)
    replace = {name: replacing(sae) for name, sae in saes.items()}
    run = SplicedRun(plain, site, mean, replace, residual="hook_resid" in manifest.hook_name)
    done, total = 0, min(config.lm_tokens, cache.n_split(config.split))
    for tokens, rows in cache.contexts(config.split):
        if done == 0:
            check_same_model(plain, site, cache, tokens, rows)
        run.add(tokens, rows)
        done += int((rows >= 0).sum())
        if progress is not None:
            progress("language model", min(done, total), total)
        if done >= total:
            break
    return run


def _timing(run: SplicedRun, seconds: float) -> dict[str, float]:
    return {
        "seconds_language_model": run.seconds_lm,
        "ratio_to_language_model": seconds / run.seconds_lm,
        "ablation_passes_reused": run.passes_reused,
    }


def _settings(sae: SAE, cache: ActivationCache, config: EvaluateConfig, timing: dict[str, float]) -> dict[str, Any]:
    manifest = cache.manifest
    return {
        **asdict(config),
        "variant": sae.variant,
        "selection_sees_labels": config.use_gradients,
        "cache": str(cache.path),
        "cache_fingerprint": cache.fingerprint,
        "model": manifest.model,
        "hook_name": manifest.hook_name,
        "untouched_positions": (
            f"positions without a row in the cache: the first {manifest.skip_first} of each context"
            + (f", and tokens with a norm above {manifest.max_norm}" if manifest.max_norm is not None else "")
        ),
        "language_model": "not run" if "seconds_language_model" not in timing else manifest.model,
        "ratio_counts": "all seconds of this evaluation over the seconds inside the language model: layers below the "
        "hook once per context, layers above once per variant (untouched, with SAE, and each ablation that was not "
        "reused); encoding, decoding, losses and metrics are what the ratio adds",
    }

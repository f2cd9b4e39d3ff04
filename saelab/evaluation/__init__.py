"""Evaluation of an SAE: on cached activations, and spliced into the running language model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saelab import kernels
from saelab.data.cache import ActivationCache
from saelab.data.cache.manifest import DROPPED
from saelab.data.cache.reader import Split
from saelab.errors import UserError
from saelab.evaluation.reconstruction import Progress, check_pair, count_firing, reconstruction
from saelab.evaluation.report import Evaluation, fit_remark, l0_remark, split_remark
from saelab.evaluation.same_model import check_same_model, plain_route
from saelab.evaluation.seeds import Stability, shared_with_seeds, stability
from saelab.evaluation.splice import Replace, SplicedRun
from saelab.evaluation.tasks.battery import TaskConfig, run_tasks
from saelab.sae import SAE

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "Stability",
    "TaskConfig",
    "evaluate",
    "fit_remark",
    "l0_remark",
    "run_tasks",
    "shared_with_seeds",
    "spliced",
    "split_remark",
    "stability",
]


@dataclass(frozen=True)
class EvaluateConfig:
    """How much to evaluate. Counts are in tokens."""

    split: Literal["train", "held_out", "all"] = "held_out"
    """Rows of the cache to evaluate on; only the held-out ones are an honest test."""
    max_tokens: int | None = None
    """Rows for the metrics of reconstruction; by default the whole split."""
    lm_tokens: int = 8192
    """Tokens run through the language model for cross-entropy and KL, in whole contexts spread evenly over the split;
    0 leaves it out."""
    density_tokens: int = 100_000
    """Training rows added to the window in which dead and dense latents are counted, beyond those that are in it."""
    batch_size: int = 4096
    """Tokens per batch."""
    use_gradients: bool = False
    """Let a gradient-aware SAE see the cached gradients of the loss. They contain the labels: an upper bound."""
    seed: int = 0
    """Seed of the bootstrap."""
    any_weights: bool = False
    """Accept a model whose weights are not those that the activations come from, such as a fine-tuned one. Loss and KL
    are then of that model, FVU and density of the stored activations."""

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

    A transcoder needs a cache with its target (:meth:`~saelab.data.cache.ActivationCache.with_target`): its metrics are
    those of the target, and spliced in it replaces the activations there.

    ``model`` is the language model that the cache was harvested from, as :func:`saelab.load_model` gives it or as a
    plain Hugging Face causal model; without it, or with ``lm_tokens=0``, cross-entropy and KL are left out. The SAE is
    evaluated in eval mode.
    """
    config = config or EvaluateConfig()
    check_pair(sae, cache, config.split)
    started = time.perf_counter()
    with sae.evaluating(), kernels.default_precision("auto"):
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
        first = cache.split_rows(config.split)[0]
        count_firing(
            sae, cache, firing, config.density_tokens, counted=(first, first + firing.n),
            batch_size=config.batch_size, progress=progress,
        )  # fmt: skip
        metrics |= firing.estimates()
        timing = {"seconds_reconstruction": seconds_offline}
        if model is not None and config.lm_tokens:
            run = spliced({"sae": sae}, cache, model, config, progress)
            metrics |= run.sums["sae"].estimates(seed=config.seed)
            timing |= _timing(run, time.perf_counter() - started)
    timing["seconds"] = time.perf_counter() - started
    settings = _settings(sae, cache, config, timing) | _documents(cache, config)
    return Evaluation(metrics, firing.histogram(), settings, timing, sums.by_document())


def spliced(
    saes: Mapping[str, SAE],
    cache: ActivationCache,
    model: Any,
    config: EvaluateConfig,
    progress: Progress | None = None,
) -> SplicedRun:
    """Run about ``lm_tokens`` tokens of the split with one SAE after the other spliced in.

    They are whole contexts, spread evenly over the split, so that they come from all its documents.
    """
    manifest = cache.goal.manifest

    def replacing(sae: SAE) -> Replace:
        def replace(x: Tensor, rows: Tensor) -> Tensor:
            grads = cache.read(rows, grads=True).grads if config.use_gradients else None
            return sae(x.to(sae.device), None if grads is None else grads.to(sae.device)).to(x.device)

        return replace

    plain, route = plain_route(model, cache)
    mean = torch.tensor(manifest.mean, dtype=torch.float32)
    replace = {name: replacing(sae) for name, sae in saes.items()}
    run = SplicedRun(plain, route, mean, replace, residual="hook_resid" in manifest.hook_name)
    contexts = spread(cache, config.split, config.lm_tokens)
    for done, (tokens, rows) in enumerate(contexts):
        if done == 0:
            check_same_model(plain, route.read, cache, tokens, rows, config.any_weights)
            if cache.target is not None:
                check_same_model(plain, route.write, cache.target, tokens, rows, config.any_weights)
        own = rows[rows >= 0]
        # A context may begin with the end of the document before: it counts for the one of its middle row.
        run.add(tokens, rows, cache.document(int(own[len(own) // 2])))
        if progress is not None:
            progress("language model", done + 1, len(contexts))
    return run


def spread(cache: ActivationCache, split: Split, n_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Contexts with about ``n_tokens`` rows in all, spread evenly over a split: token ids, and their rows (or -1)."""
    n, rows = sum(1 for _ in cache.contexts(split)), cache.n_split(split)
    count = min(n, max(1, round(n * n_tokens / rows)))
    chosen = {(2 * i + 1) * n // (2 * count) for i in range(count)}
    return [context for i, context in enumerate(cache.contexts(split)) if i in chosen]


def _documents(cache: ActivationCache, config: EvaluateConfig) -> dict[str, int]:
    """How many documents the rows of reconstruction metrics are of, and how many of these have training rows too."""
    measured = cache.document_numbers(config.split, config.max_tokens)
    trained = cache.document_numbers("train")
    return {"documents": len(measured), "documents_trained_on": int(torch.isin(measured, trained).sum())}


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
        **({} if cache.target is None else {"hook_name_out": cache.target.hook_name, "target": str(cache.target.path)}),
        "untouched_positions": (
            f"positions without a row in the cache: the first {manifest.skip_first} of each context"
            + (f", and {manifest.dropped_rows} others, {DROPPED}" if manifest.dropped_rows > 0 else "")
        ),
        "language_model": "not run" if "seconds_language_model" not in timing else manifest.model,
        "ratio_counts": "all seconds of this evaluation over the seconds inside the language model: layers below the "
        "hook once per context, layers above once per variant (untouched, with SAE, and each ablation that was not "
        "reused); encoding, decoding, losses and metrics are what the ratio adds",
    }

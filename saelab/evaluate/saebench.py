"""Our evaluations in the JSON shape of SAEBench, so that its plots and pages read them.

One file per evaluation, named ``<id>_eval_results.json``: ``eval_type_id``, ``eval_config``, ``eval_id``,
``datetime_epoch_millis``, ``eval_result_metrics {category: {metric: number}}``, ``eval_result_details``, and the
SAE's identity. Numbers keep SAEBench's names where the formula is the same; explained variance is 1 - FVU, which is
what the name promises, and not the formula of SAEBench 0.6.0 (see ``saelab.metrics.LEGACY``).
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from saelab._version import __version__
from saelab.checkpoint import load_config, write_json
from saelab.evaluate.report import Evaluation

# SAEBench's category -> its metric -> ours
CORE = {
    "model_behavior_preservation": {
        "kl_div_score": "kl_recovered_zero",
        "kl_div_with_ablation": "kl_div_with_zero_ablation",
        "kl_div_with_sae": "kl_div_with_sae",
    },
    "model_performance_preservation": {
        "ce_loss_score": "ce_loss_recovered_zero",
        "ce_loss_with_ablation": "ce_loss_with_zero_ablation",
        "ce_loss_with_sae": "ce_loss_with_sae",
        "ce_loss_without_sae": "ce_loss_without_sae",
    },
    "reconstruction_quality": {
        "explained_variance": "explained_variance",
        "explained_variance_legacy": "legacy_explained_variance_per_token",
        "mse": "mse",
        "cossim": "cosine",
    },
    "shrinkage": {
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "relative_reconstruction_bias",
    },
    "sparsity": {"l0": "l0", "l1": "l1"},
}


def core(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """The metrics of SAEBench's core evaluation that were measured."""
    metrics = {
        category: {name: evaluation[ours] for name, ours in names.items() if ours in evaluation.metrics}
        for category, names in CORE.items()
    }
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": _n(evaluation, "ce_loss_with_sae"),
        "total_tokens_eval_sparsity_variance": _n(evaluation, "l0"),
    }
    metrics["misc_metrics"] = {"frac_alive": 1 - evaluation["dead_fraction"]}
    return {category: values for category, values in metrics.items() if values}


def _n(evaluation: Evaluation, name: str) -> int:
    return evaluation.metrics[name].n if name in evaluation.metrics else 0


def document(
    eval_type: str,
    metrics: dict[str, dict[str, float]],
    *,
    config: dict[str, Any],
    run: Path | str,
    details: list[dict[str, Any]] | None = None,
    unstructured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One SAEBench result: ``eval_type`` is core, sparse_probing, scr, tpp or absorption."""
    cfg = load_config(run)
    metadata = cfg.get("metadata", {})
    return {
        "eval_type_id": eval_type,
        "eval_config": config,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details or [],
        "eval_result_unstructured": unstructured or {},
        "sae_bench_commit_hash": f"saelab {__version__}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": Path(run).resolve().name,
        "sae_lens_version": metadata.get("sae_lens_version", ""),
        "sae_cfg_dict": {
            **{key: value for key, value in cfg.items() if key != "metadata"},
            **{key: metadata.get(key) for key in ("model_name", "hook_name", "context_size", "prepend_bos")},
        },
    }


def save(content: dict[str, Any], folder: Path | str) -> Path:
    """Write a result into ``folder/<type>/``, where SAEBench's plots look for it."""
    path = Path(folder) / content["eval_type_id"] / f"{content['sae_lens_release_id']}_custom_sae_eval_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path

"""Evaluations in SAEBench's JSON format, so that its plots and pages can read them.

One file per evaluation, named ``<id>_eval_results.json``: ``eval_type_id``, ``eval_config``, ``eval_id``,
``datetime_epoch_millis``, ``eval_result_metrics {category: {metric: number}}``, ``eval_result_details``, and the
SAE's identity. Under SAEBench's names stand numbers of SAEBench's formulas: ``mse`` is divided by the tokens of a
batch once more, as there, and ``l1`` is the sum of the values with their signs; SCR and TPP ablate whole latents. One
name differs: explained variance is 1 - FVU, which is what it promises, and not the formula of SAEBench 0.6.0 (see
``saelab.metrics.LEGACY``). Tasks on other labels
and models than SAEBench's own give numbers of the same definition, not comparable ones: ``eval_config`` says on what.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from saelab._version import __version__
from saelab.evaluation.report import Evaluation
from saelab.files import write_json
from saelab.sae.weights import load_config

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
        "mse": "legacy_mse_per_batch",
        "cossim": "cosine",
    },
    "shrinkage": {
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "relative_reconstruction_bias",
    },
    "sparsity": {"l0": "l0", "l1": "legacy_l1_with_signs"},
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


def task_metrics(task: str, found: dict[str, Any]) -> tuple[str, dict[str, dict[str, float]]] | None:
    """The type id of SAEBench's evaluation and its metrics, from a result of ``run_tasks``; None where it has none.

    Several labels stand for SAEBench's several data sets, over which it takes the mean.
    """
    if task == "absorption":
        names = {"mean_absorption_fraction_score": "absorption_fraction",
                 "mean_full_absorption_score": "full_absorption_rate",
                 "mean_num_split_features": "split_latents"}  # fmt: skip
        return "absorption_first_letter", {"mean": {name: found[ours] for name, ours in names.items()}}
    if task == "probing":
        return "sparse_probing", {side: _mean([_probing(rows, side) for rows in found.values()])
                                  for side in ("llm", "sae")}  # fmt: skip
    if task == "sae-probes":
        means = {name.replace("_accuracy", "_test_accuracy").replace("_auc", "_test_auc").replace("_f1", "_test_f1"):
                 e["value"] for name, e in found["means"].items() if name.startswith("sae_")}  # fmt: skip
        return "sparse_probing_sae_probes", {"llm": {}, "sae": means}
    if task in ("scr", "tpp"):
        per_set = {"scr": _scr, "tpp": _tpp}[task]
        units = [rows.get("whole_latents", rows) for rows in found.values()]  # SAEBench knows no poles
        return task, {f"{task}_metrics": _mean([per_set(rows) for rows in units])}
    return None


def _probing(rows: dict[str, Any], side: str) -> dict[str, float]:
    out = {"llm_test_accuracy": rows["dense_probe_test_accuracy"]["value"]} if side == "llm" else {}
    ours = "channels" if side == "llm" else "sae"
    for name, estimate in rows.items():
        if name.startswith(f"{ours}_top_"):
            out[name.replace(ours, side, 1)] = estimate["value"]
    return out


def _scr(rows: dict[str, Any]) -> dict[str, float]:
    first, second = rows["score_by_intended"]
    return {f"scr_{name}_threshold_{n}": scores[n]
            for name, scores in (("metric", rows["score"]), ("dir1", first), ("dir2", second))
            for n in rows["score"]}  # fmt: skip


def _tpp(rows: dict[str, Any]) -> dict[str, float]:
    out = {}
    for n, score in rows["score"].items():
        out[f"tpp_threshold_{n}_total_metric"] = score
        out[f"tpp_threshold_{n}_intended_diff_only"] = rows["drop_intended"][n]
        out[f"tpp_threshold_{n}_unintended_diff_only"] = rows["drop_intended"][n] - score
    return out


def _mean(sets: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(found[name] for found in sets) / len(sets) for name in sets[0]}


def documents(evaluation: Evaluation, run: Path | str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """One SAEBench result for the evaluation itself, and one for each of its tasks that SAEBench has."""
    out = [document("core", core(evaluation), config=evaluation.settings, run=run)]
    for task, found in evaluation.tasks.items():
        if (mapped := task_metrics(task, found)) is not None:
            out.append(document(*mapped, config=config, run=run, unstructured=found))
    return out


def document(
    eval_type: str,
    metrics: dict[str, dict[str, float]],
    *,
    config: dict[str, Any],
    run: Path | str,
    unstructured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One SAEBench result: ``eval_type`` is core, sparse_probing, scr, tpp or absorption_first_letter."""
    cfg = load_config(run)
    metadata = cfg.get("metadata", {})
    return {
        "eval_type_id": eval_type,
        "eval_config": config,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": [],
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
    kind = content["eval_type_id"].removesuffix("_first_letter")  # its folder has the shorter name
    path = Path(folder) / kind / f"{content['sae_lens_release_id']}_custom_sae_eval_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path

"""The scores of the package sae-probes itself, on one SAE and the same activations, against ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from saelab.evaluation.tasks import probe_sets
from saelab.sae import build

if importlib.util.find_spec("sae_probes") is None:
    pytest.skip("sae-probes is not installed here; run `make test-interop`", allow_module_level=True)

D, D_SAE, HOOK, MODEL = 24, 96, "blocks.1.hook_resid_post", "tiny"
SETS = ("100_news_fake", "87_glue_cola")
SEEDS = (42, 43, 44)


def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package's evaluation; of xgboost, which it imports for a baseline that is not used here, a name suffices."""
    if importlib.util.find_spec("xgboost") is None:
        monkeypatch.setitem(sys.modules, "xgboost", ModuleType("xgboost"))
    return pytest.importorskip("sae_probes.run_sae_evals")


class Dense(torch.nn.Module):
    """Our SAE with the interface that the package calls."""

    def __init__(self, sae) -> None:
        super().__init__()
        self.inner = sae

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.encode(x).dense()


@pytest.mark.parametrize("variant", ["topk", "abs_topk"])
def test_scores_are_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    theirs = package(monkeypatch)
    folder, generator = probe_sets.data_folder(), torch.Generator().manual_seed(0)
    assert probe_sets.set_names(folder) == theirs.DATASETS
    torch.manual_seed(0)
    sae, activations = build(variant, D, D_SAE, k=8).eval(), {}
    place = tmp_path / f"model_activations_{MODEL}"
    place.mkdir()
    for name in SETS:
        one = probe_sets.read_set(folder, name)
        # In place of a language model: noise, with the class along two directions that no latent has exactly.
        x = torch.randn(len(one.labels), D, generator=generator)
        x[:, :2] += 0.8 * torch.from_numpy(one.labels)[:, None] * torch.tensor([1.0, -0.5])
        activations[name] = x.numpy(), one.labels
        rows = len(probe_sets._table(folder / "cleaned_data" / f"{name}.csv.zst", ("prompt",))["prompt"])
        torch.save(torch.cat([x, torch.zeros(max(rows - len(x), 0), D)]), place / f"{name}_{HOOK}.pt")
    want: dict[str, list[float]] = {}
    for seed in SEEDS:
        results = tmp_path / f"results-{seed}"
        for name in SETS:
            theirs.run_sae_eval(
                Dense(sae), name, HOOK, "l2", "normal", MODEL, tmp_path, device="cpu", ks=list(probe_sets.KS),
                results_path=results, seed=seed,
            )  # fmt: skip
            path = theirs.get_save_metrics_path(name, HOOK, "l2", MODEL, results)
            for row in json.loads(path.read_text()):
                for metric, key in (("auc", "test_auc"), ("accuracy", "test_acc"), ("f1", "test_f1")):
                    want.setdefault(f"sae_top_{row['k']}_{metric}", []).append(row[key])
    found = probe_sets.probe_sets(sae, activations, seeds=SEEDS)["means"]
    for name, values in want.items():
        mean, estimate = float(np.mean(values)), found[name]
        assert estimate["low"] <= mean <= estimate["high"], name  # within the interval over reseeds
        assert estimate["value"] == pytest.approx(mean, abs=2e-3), name  # and far closer: the same splits

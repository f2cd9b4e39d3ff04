"""The SAEs that come with the project: all variants, complete, small, and fitting the model they were trained on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab import shipped
from saelab.features import FeatureIndex
from saelab.layout import WEIGHTS
from saelab.sae import VARIANTS
from saelab.sae.weights import load_metadata

FOLDER = shipped.checkpoints()
RUNS = sorted(path.parent for path in FOLDER.glob("*/cfg.json"))
MEBIBYTES = 90


def test_every_variant_is_there() -> None:
    assert {load_metadata(run)["saelab"]["variant"] for run in RUNS} == set(VARIANTS)


def test_the_folder_stays_small_enough_to_clone() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < MEBIBYTES * 2**20


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_is_complete(run: Path) -> None:
    saved = load_file(run / WEIGHTS)
    assert {value.dtype for value in saved.values() if value.ndim == 2} == {torch.float16}
    sae, metadata = saelab.load(run), load_metadata(run)
    assert metadata["model_name"] == "smollm2"
    assert sae.W_dec.dtype == torch.float32
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert 28 < metrics["l0"]["value"] < 36
    assert 0.05 < metrics["fvu"]["value"] < 0.25
    assert metrics["dead_fraction"]["value"] < 0.05
    index = FeatureIndex(run)
    assert set(index.table()["latent"]) == set(range(sae.d_sae))
    assert index.examples(int(index.table().sort_values("count")["latent"].iloc[-1]), kind="top")
    assert metadata["saelab"]["variant"] in (run / "README.md").read_text()
    assert (run / "metrics.jsonl").stat().st_size > 0


def test_the_readme_shows_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("table", FOLDER / "table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in (FOLDER / "README.md").read_text()


@pytest.mark.smollm2
def test_they_reconstruct_the_activations_of_their_model() -> None:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    model = saelab.load_model("smollm2")
    prompt = "The city lies on the river, and its old harbour was built by merchants in the twelfth century."
    places: dict[Path, tuple[str, str]] = {}
    for run in RUNS:
        about = load_metadata(run)
        places[run] = about["hook_name"], about.get("hook_name_out") or about["hook_name"]
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt, names_filter=[name for both in places.values() for name in both])
    for run, (source, target) in places.items():
        x, y = cache[source][0, 1:], cache[target][0, 1:]
        sae = saelab.load(run)
        with torch.no_grad():
            error = (y - sae.decode(sae.encode(x))).square().sum()
        # Out of the training text, and one sentence: far from the held-out FVU, but far below explaining nothing.
        assert error / (y - y.mean(0)).square().sum() < 0.6, run.name

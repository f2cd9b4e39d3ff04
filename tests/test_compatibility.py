"""Folders written by saelab 0.1.0 open, read the same numbers, and can be worked on.

``tests/data/v0.1.0`` holds what the code of 0.1.0 wrote (see ``tests/data/make_v0_1_0.py``) and the numbers it computed
from these files. On the machine that wrote them the current code agrees to the last bit; the tolerances below leave
room for another processor's order of summation, and for nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import saelab
from saelab import ActivationCache, FeatureIndex, workspace
from saelab.cli import main
from saelab.features import explanations
from saelab.lm import load_hf_model
from saelab.steering import Recipe
from saelab.sweep import load_results
from saelab.workspace.notes import read_notes

FOLDER = Path(__file__).parent / "data" / "v0.1.0"
NUMBERS: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
TENSORS: dict[str, Tensor] = load_file(FOLDER / "expected.safetensors")


def names(folder: str) -> list[str]:
    return sorted(path.name for path in (FOLDER / folder).iterdir())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-4, atol=1e-5)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a finished run."""
    return {name: t for path in sorted(folder.glob("sae*.safetensors")) for name, t in load_file(path).items()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into; the paths inside the files are relative to it."""
    shutil.copytree(FOLDER, tmp_path / "v0.1.0")
    monkeypatch.chdir(tmp_path / "v0.1.0")
    return tmp_path / "v0.1.0"


@pytest.mark.parametrize("name", names("caches"))
def test_a_cache_reads_the_same_rows_in_the_same_order(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache, expected = ActivationCache(f"caches/{name}"), NUMBERS["caches"][name]
    assert (cache.fingerprint, cache.hook_name) == (expected["fingerprint"], expected["hook_name"])
    assert {split: cache.n_split(split) for split in ("train", "held_out")} == expected["rows"]
    batches = list(cache.batches(96, seed=3, split="train", grads=cache.has_grads))
    acts = torch.cat([b.acts for b in batches]).double()
    assert acts.sum().item() == pytest.approx(expected["sum"], rel=1e-9)
    assert acts.square().sum().item() == pytest.approx(expected["squares"], rel=1e-9)
    assert batches[0].acts[0].double().tolist() == expected["first"]
    assert cache.has_grads == (expected["grad_squares"] is not None)
    if cache.has_grads:
        grads = torch.cat([b.grads for b in batches if b.grads is not None]).double()
        assert grads.square().sum().item() == pytest.approx(expected["grad_squares"], rel=1e-9)
    assert digest([b.rows for b in batches]) == expected["order"]
    assert digest([b.tokens for b in batches]) == expected["tokens"]
    main(["cache", "verify", f"caches/{name}"])
    assert "intact" in capsys.readouterr().out


def digest(parts: list[Tensor]) -> str:
    return hashlib.sha256(torch.cat(parts).long().numpy().tobytes()).hexdigest()


def test_harvesting_the_same_text_again_gives_the_same_caches() -> None:
    for name, hook in (("post", "blocks.1.hook_resid_post"), ("pre", "blocks.2.hook_resid_pre")):
        options = ["--text", "corpus.txt", "--context-length", "32", "--tokens", "1024", "--held-out", "0.2"]
        main(["harvest", "--out", f"again/{name}", "--hook", hook, "--model", "lm", "--device", "cpu", *options])
        now, before = ActivationCache(f"again/{name}"), ActivationCache(f"caches/{name}")
        assert (now.manifest.weights_fingerprint, now.n_rows) == (before.manifest.weights_fingerprint, before.n_rows)
        pairs = zip(*(list(c.batches(64, seed=None, split="all")) for c in (now, before)))
        for ours, theirs in pairs:
            assert torch.equal(ours.tokens, theirs.tokens)
            torch.testing.assert_close(ours.acts, theirs.acts, rtol=2e-3, atol=2e-4)  # stored in float16


@pytest.mark.parametrize("name", names("runs"))
def test_a_run_encodes_and_decodes_alike(name: str) -> None:
    sae = saelab.load(f"runs/{name}")
    x = TENSORS[f"probe_{sae.d_in}"]
    with torch.no_grad():
        close(sae.encode(x).dense(), TENSORS[f"code/{name}"])
        close(sae(x), TENSORS[f"recon/{name}"])
    assert (sae.encode(x).dense() != 0).sum() == (TENSORS[f"code/{name}"] != 0).sum()


@pytest.mark.parametrize("name", names("unfinished"))
def test_an_unfinished_run_ends_as_if_it_had_never_stopped(name: str) -> None:
    main(["train", "caches/planted", "--out", f"unfinished/{name}", "--resume", "--device", "cpu"])
    now, whole = weights(Path("unfinished", name)), weights(Path("runs", name))
    assert set(whole) <= set(now)
    for key, expected in whole.items():
        close(now[key], expected)
    logs = [Path(folder, name, "metrics.jsonl").read_text().splitlines() for folder in ("unfinished", "runs")]
    ours, theirs = ([json.loads(line) for line in log] for log in logs)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 13))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)


def test_an_unfinished_run_refuses_other_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "caches/planted", "--out", "unfinished/topk", "--resume", "--device", "cpu", "--lr", "0.5"])
    assert "lr=0.5 differs from lr=0.01" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", NUMBERS["indexes"])
def test_an_index_opens(name: str) -> None:
    index, expected = FeatureIndex(f"runs/{name}"), NUMBERS["indexes"][name]
    table = index.table().to_dict("list")
    assert [table["latent"], table["pole"], table["count"]] == expected["counts"]
    assert set(expected["columns"]) <= set(table)
    latent, pole = expected["top"]
    assert index.max_activation(latent, pole) == pytest.approx(expected["max_activation"])
    assert ["".join(e.strings) for e in index.examples(latent, pole, "top")] == expected["examples"]


def test_explanations_and_notes_are_read() -> None:
    content = json.loads(Path("runs/lm_post/explanations.json").read_text())
    found = explanations.load(Path("runs/lm_post"))
    assert set(found) == {(entry["latent"], entry["pole"]) for entry in content} and len(found) == 2
    assert all(entry["text"] == "a word of the corpus" for entry in found.values())
    assert read_notes("runs/lm_post") == {0: {"label": "a label", "note": "a note of several words"}}


def test_the_workspace_lists_the_runs_with_their_numbers(folder: Path) -> None:
    found = workspace.Workspace.scan(folder)
    assert {f"runs/{name}" for name in names("runs")} <= set(found.runs)
    run = found.run("runs/lm_post")
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    assert workspace.numbers(run)["fvu"].value == evaluation["metrics"]["fvu"]["value"]
    cache, model = found.cache_of(run), found.model_of(run)
    assert cache is not None and cache.fingerprint == NUMBERS["caches"]["post"]["fingerprint"] and model is not None


@pytest.mark.parametrize("name", ["lm_post", "lm_signed"])
def test_a_run_is_evaluated_to_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(cache: ActivationCache, split: Any, n_tokens: int) -> list[Any]:
        """The contexts that 0.1.0 ran through the model: the first ones."""
        counts = itertools.accumulate(int((rows >= 0).sum()) for _, rows in cache.contexts(split))
        wanted = 1 + sum(1 for _ in itertools.takewhile(lambda total: total < n_tokens, counts))
        return list(itertools.islice(cache.contexts(split), wanted))

    monkeypatch.setattr("saelab.evaluation.spread", first)
    before = json.loads(Path(f"runs/{name}/evaluation.json").read_text())["metrics"]
    cache = {"lm_post": "post", "lm_signed": "gradients"}[name]
    main(["evaluate", f"runs/{name}", "--cache", f"caches/{cache}", "--lm-tokens", "128"])
    after = json.loads(Path(f"runs/{name}/evaluation.json").read_text())["metrics"]
    for metric in ("fvu", "l0", "dead_fraction", "ce_loss_with_sae", "kl_div_with_sae"):
        assert after[metric]["value"] == pytest.approx(before[metric]["value"], rel=1e-3, abs=1e-6), metric


def test_a_sweep_is_read_and_resumed() -> None:
    rows = load_results("sweeps/finished")
    for now, before in zip(rows, NUMBERS["sweep"], strict=True):
        assert {key: now[key] for key in before} == before
    main(["sweep", "caches/planted", "grid.toml", "--out", "sweeps/unfinished", "--device", "cpu", "--resume"])
    resumed = load_results("sweeps/unfinished")
    assert [row["status"] for row in resumed] == ["finished", "finished", "halted", "halted"]
    for now, before in zip(resumed, rows):
        assert (now["fvu"] or 0.0) == pytest.approx(before["fvu"] or 0.0, rel=1e-4)
        path = Path("sweeps/finished", before["folder"])
        for key, expected in weights(path).items():
            close(weights(Path("sweeps/unfinished", now["folder"]))[key], expected)


@pytest.mark.parametrize("name", names("recipes"))
def test_a_recipe_steers_to_the_same_logits(name: str) -> None:
    model, tokens = load_hf_model("lm"), TENSORS["recipe_tokens"]
    recipe = Recipe.load(f"recipes/{name}")
    with torch.no_grad(), recipe.attach(model):
        steered = model(tokens).logits[0, -3:]
    torch.testing.assert_close(steered, TENSORS[f"logits/{name}"], rtol=1e-3, atol=1e-4)
    assert (steered - TENSORS["logits/none"]).abs().max() > 0.1
    for now, before in zip(recipe.settings(), NUMBERS["recipes"][name], strict=True):
        assert now["op"] == before["op"] and now["hook_name"] == before["hook_name"]

"""The language model behind a cache, from the command line: its weights, its precision, and the refusal of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saelab import ActivationCache, FeatureIndex, Run
from saelab.cli import main
from saelab.lm import load_hf_model, load_model, unembedding
from saelab.runs.language_model import model_record
from tests import tiny_lm

HOOK = "blocks.1.hook_resid_post"
SAVES = {"llama": tiny_lm.save_llama, "qwen2": tiny_lm.save_qwen2, "gemma3": tiny_lm.save_gemma3}


# What is recorded and refused does not depend on the family; the one kept for every run scales its embeddings.
FAMILIES = [pytest.param(name, marks=[pytest.mark.minutes] * (name != "gemma3")) for name in SAVES]


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model in float32, a cache that was harvested in bfloat16, and an SAE."""
    root = tmp_path_factory.mktemp(request.param)
    model, text = SAVES[request.param](root / "model"), root / "text.txt"
    text.write_text(tiny_lm.sentences(900))
    where = ["--model", str(model), "--hook", HOOK, "--text", str(text), "--out", str(root / "cache")]
    size = ["--tokens", "1024", "--context-length", "32", "--held-out", "0.2"]
    main(["harvest", *where, *size, "--model-dtype", "bfloat16"])
    main(
        [
            "train",
            str(root / "cache"),
            "--variant",
            "topk",
            "--d-sae",
            "32",
            "--k",
            "4",
            "--batch-size",
            "128",
            "--out",
            str(root / "run"),
        ]
    )
    return SimpleNamespace(root=root, model=model, cache=str(root / "cache"), run=str(root / "run"), save=SAVES)


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(list(command))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.split())


def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The precisions in which commands load the model from here on."""
    from saelab.lm import record

    seen: list[torch.dtype] = []

    def loading(load: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            model = load(*args, **options)
            seen.append(next(getattr(model, "original_model", model).parameters()).dtype)
            return model

        return wrapped

    for name in ("load_model", "load_hf_model"):
        monkeypatch.setattr(record, name, loading(getattr(record, name)))
    return seen


def test_a_cache_says_in_which_precision_its_model_ran(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    manifest = ActivationCache(world.cache).manifest
    assert manifest.model_dtype == "bfloat16"
    seen = dtypes(monkeypatch)
    main(["evaluate", world.run, "--cache", world.cache, "--lm-tokens", "128", "--json"])
    found = json.loads(capsys.readouterr().out)["metrics"]["ce_loss_without_sae"]["value"]
    main(["index", world.run, "--cache", world.cache, "--top", "2", "--overwrite"])
    main(["steer", world.run, "--latent", "3", "--strength", "4", "--prompt", "the cat", "--max-new-tokens", "2"])
    assert seen == [torch.bfloat16] * 3
    main([
        "evaluate", world.run, "--cache", world.cache, "--lm-tokens", "128", "--json", "--model-dtype", "float32"
    ])  # fmt: skip
    assert seen[3:] == [torch.float32]
    expected, contexts = 0.0, ActivationCache(world.cache).contexts("held_out")
    plain, sums, count = load_hf_model(world.model, device="cpu", dtype="bfloat16"), 0.0, 0
    for tokens, rows in contexts:
        with torch.no_grad():
            logits = plain(input_ids=tokens[None]).logits[0].float()
        at = (rows[:-1] >= 0).nonzero().flatten()
        sums += float(torch.nn.functional.cross_entropy(logits[at], tokens[1:][at], reduction="sum"))
        count += int((rows >= 0).sum())
        expected += len(at)
        if count >= 128:
            break
    # bfloat16 has 8 bits, and the command and this loop run other batch shapes.
    assert found == pytest.approx(sums / expected, rel=2e-2)


def test_find_looks_at_the_weights_that_each_run_records(world: Any, tmp_path: Path, capsys: Any) -> None:
    """Two runs name one model, and one of them was made from other weights."""
    main(["index", world.run, "--cache", world.cache, "--top", "2", "--overwrite"])
    shutil.copytree(world.run, tmp_path / "runs" / "a")
    shutil.copytree(world.run, tmp_path / "runs" / "b")
    main(["find", "the [[cat]]", str(tmp_path / "runs")])
    file = tmp_path / "runs" / "b" / "cfg.json"
    content = json.loads(file.read_bytes())
    content["metadata"]["language_model"] |= {"fingerprint": "0123456789abcdef", "rounded": {}}
    file.write_text(json.dumps(content), encoding="utf-8")
    said = refused(capsys, "find", "the [[cat]]", str(tmp_path / "runs"))
    assert "the SAE b was made with other weights" in said


def test_weights_trained_in_place_are_refused_by_every_command(world: Any, tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    main(["index", world.run, "--cache", world.cache, "--top", "2", "--overwrite"])
    file = world.model / "model.safetensors"
    before = file.read_bytes()
    tensors = load_file(file)
    last = next(name for name in tensors if "layers.2" in name and "down_proj" in name)  # above the hook point
    save_file({**tensors, last: tensors[last] * 1.5}, file, {"format": "pt"})
    steer = ["steer", world.run, "--latent", "3", "--strength", "4", "--prompt", "the cat", "--max-new-tokens", "2"]
    index = ["index", world.run, "--cache", world.cache, "--top", "2", "--overwrite"]
    evaluate = ["evaluate", world.run, "--cache", world.cache, "--lm-tokens", "64"]
    try:
        for command in (steer, index, evaluate):
            said = refused(capsys, *command)
            assert "other weights" in said and "weights (" in said, said
        main([*steer, "--any-weights"])
        main([*index, "--any-weights"])
        capsys.readouterr()
        main([*evaluate, "--any-weights", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["settings"]["any_weights"]
        # The model that ran is the changed one.
        plain, losses = load_hf_model(world.model, device="cpu", dtype="bfloat16"), []
        for tokens, rows in ActivationCache(world.cache).contexts("held_out"):
            with torch.no_grad():
                logits = plain(input_ids=tokens[None]).logits[0].float()
            at = (rows[:-1] >= 0).nonzero().flatten()
            losses.append(torch.nn.functional.cross_entropy(logits[at], tokens[1:][at], reduction="none"))
        mean = float(torch.cat(losses).mean())
        assert found["metrics"]["ce_loss_without_sae"]["value"] == pytest.approx(mean, rel=5e-2)
    finally:
        file.write_bytes(before)
    main(steer)


def test_an_index_is_of_the_recorded_weights(world: Any) -> None:
    main(["index", world.run, "--cache", world.cache, "--top", "2", "--overwrite"])
    index, sae = FeatureIndex(world.run), Run.open(world.run).sae
    end = unembedding(load_model(world.model, device="cpu", dtype="bfloat16"))
    direction = sae.W_dec[5].detach() * (1.0 if end.norm_weight is None else end.norm_weight)
    logits = direction @ end.weight
    assert index.latent(5)["promoted_ids"][0] == int(logits.argmax())
    assert index.meta["language_model"]["fingerprint"] == ActivationCache(world.cache).manifest.weights_fingerprint


def test_a_recipe_keeps_the_precision(world: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, prompt = str(tmp_path / "recipe"), ["--prompt", "the cat sat", "--max-new-tokens", "3", "--json"]
    main(["steer", world.run, "--latent", "3", "--strength", "8", *prompt, "--save", recipe])
    first, seen = json.loads(capsys.readouterr().out)["texts"], dtypes(monkeypatch)
    main(["steer", recipe, *prompt])
    assert json.loads(capsys.readouterr().out)["texts"] == first
    main(["steer", recipe, *prompt, "--model-dtype", "float32"])
    assert seen == [torch.bfloat16, torch.float32]


def test_a_run_whose_files_say_nothing_is_known_by_its_cache(world: Any, tmp_path: Path) -> None:
    run = Run.open(world.run)
    recorded = ActivationCache(world.cache).manifest.weights_fingerprint
    assert model_record(run).fingerprint == recorded
    config = world.root / "run" / "cfg.json"
    before = config.read_bytes()
    content = json.loads(before)
    del content["metadata"]["language_model"]  # as 0.1.0 wrote it
    config.write_text(json.dumps(content))
    try:
        assert model_record(Run.open(world.run)).fingerprint == recorded
    finally:
        config.write_bytes(before)

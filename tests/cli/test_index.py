"""``saelab index`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache, build
from saelab.cli import main
from saelab.features import FeatureIndex
from saelab.layout import TOKENS
from saelab.lm import Unembedding
from saelab.sae.weights import save
from tests import tiny_lm


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tokens = torch.randint(0, 50, (400,))
    ActivationCache.from_tensors(tmp_path / "cache", torch.randn(400, 8), tokens, context_length=20)
    save(build("topk", 8, 32, k=3), tmp_path / "run", {"hook_name": "blocks.1.hook_resid_post"})
    return tmp_path / "run"


def test_index_prints_one_json_document(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["index", str(run), "--cache", str(run.parent / "cache"), "--json", "--top", "2"])
    printed = json.loads(capsys.readouterr().out)
    index = FeatureIndex(run)
    assert printed["latents"] == 32 and printed["tokens"] == 400
    assert printed["never_fired"] == (index.table()["count"] == 0).sum()
    assert max(len(index.examples(j, kind="top")) for j in range(32)) == 2


def test_an_existing_index_is_kept_without_overwrite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["index", str(run), "--cache", str(run.parent / "cache")]
    main(command)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    main([*command, "--overwrite", "--max-tokens", "100"])
    assert FeatureIndex(run).meta["tokens"] == 100


def test_a_kept_unembedding_stands_in_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = torch.randint(0, 50, (400,))
    ActivationCache.from_tensors(tmp_path / "cache", torch.randn(400, 8), tokens, context_length=20, model="some-lm")
    save(build("topk", 8, 32, k=3), tmp_path / "run", {"hook_name": "blocks.1.hook_resid_post"})
    asked = []

    def ask(model: str) -> Unembedding:
        asked.append(model)
        generator = torch.Generator().manual_seed(0)
        return Unembedding(torch.randn(8, 60, generator=generator), torch.rand(8, generator=generator), True)

    monkeypatch.setattr("saelab.cli.commands.index.unembedding", ask)
    monkeypatch.setattr("saelab.lm.record.load_model", lambda name, **_: name)
    command = ["index", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--overwrite"]
    main(command)
    assert not (tmp_path / "run" / "logit_lens.safetensors").exists()
    main([*command, "--keep-unembedding"])
    first = FeatureIndex(tmp_path / "run").latent(3)
    assert asked == ["some-lm"] * 2
    main(command)
    again = FeatureIndex(tmp_path / "run").latent(3)
    assert asked == ["some-lm"] * 2, "the model was asked although its unembedding is kept"
    assert again["promoted_ids"][0] == first["promoted_ids"][0]
    # Half precision: each logit is a sum of 8 products whose factors keep 11 bits.
    assert again["promoted_logits"] == pytest.approx(first["promoted_logits"], rel=1e-2)
    main([*command, "--model", "other-lm"])
    main([*command, "--model", "none"])
    assert asked == ["some-lm", "some-lm", "other-lm"] and not FeatureIndex(tmp_path / "run").latent(3)["promoted"]
    (tmp_path / "run" / "logit_lens.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit):
        main(command)
    assert "logit_lens.safetensors is damaged" in capsys.readouterr().err.replace("\n", " ")


def test_a_cache_of_another_hook_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.parent / "other"
    ActivationCache.from_tensors(other, torch.randn(40, 8), hook_name="blocks.0.hook_resid_post")
    with pytest.raises(SystemExit) as left:
        main(["index", str(run), "--cache", str(other)])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "blocks.1.hook_resid_post" in error and "Traceback" not in error
    assert not (run / "features").exists()


def test_the_tokenizer_tells_what_caches_of_0_1_0_do_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They hold one text per token, which for parts of characters is U+FFFD."""
    model, text = tiny_lm.save_gpt2(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("猫が好きです。\n\n" * 40, encoding="utf-8")
    hook = "blocks.0.hook_resid_post"
    options = ["--hook", hook, "--text", str(text), "--tokens", "400", "--context-length", "21", "--device", "cpu"]
    main(["harvest", "--model", str(model), "--out", str(tmp_path / "cache"), *options])
    cache = ActivationCache(tmp_path / "cache")
    strings = [text if n not in cache.vocabulary.parts else "\ufffd" for n, text in enumerate(cache.vocabulary)]
    assert "\ufffd" in strings
    (tmp_path / "cache" / TOKENS).write_text(json.dumps(strings), encoding="utf-8")
    save(build("topk", cache.d_in, 32, k=8), tmp_path / "run", {"hook_name": hook})
    for given, broken in (([], False), (["--model", "none"], True)):
        capsys.readouterr()
        main(["index", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--overwrite", *given])
        assert ("does not hold the bytes of its tokens" in " ".join(capsys.readouterr().err.split())) is broken
        index = FeatureIndex(tmp_path / "run")
        texts = "".join(example.text for latent in range(32) for example in index.examples(latent))
        assert ("\ufffd" in texts) is broken and ("猫" in texts) is not broken

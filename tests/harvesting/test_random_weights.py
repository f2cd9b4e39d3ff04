"""Models with random weights, as a control: what is drawn and what is kept, and the same tokens through them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.harvesting import HarvestConfig, harvest, harvest_again
from saelab.lm import load_hf_model, load_model
from saelab.lm.fingerprint import named_weights
from saelab.lm.randomised import RandomWeights, randomise
from tests.tiny_lm import save_gemma3, save_gpt2, save_llama, save_qwen2, sentences

FAMILIES = {"llama": save_llama, "gpt2": save_gpt2, "qwen2": save_qwen2, "gemma3": save_gemma3}
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": sentences(60, seed)}) for seed in range(12)), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_keeps_its_mean_and_spread_and_nothing_else(tmp_path: Path, family: str) -> None:
    folder = FAMILIES[family](tmp_path / "model", seed=0)
    plain, drawn, again, kept = (load_hf_model(folder) for _ in range(4))
    randomise(drawn, RandomWeights(seed=1))
    randomise(again, RandomWeights(seed=1))
    randomise(kept, RandomWeights("all-but-embeddings", seed=1))
    embedding = plain.get_input_embeddings().weight
    for (name, before), (_, after), (_, same), (_, partly) in zip(
        *([(name, value.detach()) for name, value in named_weights(m)] for m in (plain, drawn, again, kept)),
        strict=True,
    ):
        assert torch.equal(after, same)
        n, sd = before.numel(), float(before.std())
        # Five standard errors of a mean and of a standard deviation.
        assert float(after.mean()) == pytest.approx(float(before.mean()), abs=5 * sd / n**0.5 + 1e-6), name
        assert float(after.std()) == pytest.approx(sd, abs=5 * sd / (2 * n) ** 0.5 + 1e-6), name
        if sd > 0:
            assert not torch.equal(after, before), name
            if before.numel() > 100:
                assert abs(float(torch.corrcoef(torch.stack([after.flatten(), before.flatten()]))[0, 1])) < 0.3, name
        is_embedding = before.shape == embedding.shape or "wpe" in name
        assert torch.equal(partly, before) == (is_embedding or sd == 0), name


def test_the_command_writes_what_was_randomised(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save_llama(tmp_path / "model")
    args = ["--model", str(folder), "--text", str(text), "--hook", HOOK, "--context-length", "16", "--tokens", "600"]
    main(["harvest", "--out", str(tmp_path / "real"), *args])
    main(["harvest", "--out", str(tmp_path / "random"), *args, "--random-weights", "all", "--random-seed", "3"])
    real, random = ActivationCache(tmp_path / "real"), ActivationCache(tmp_path / "random")
    assert random.manifest.settings["random_weights"]["seed"] == 3
    assert "random weights: all, seed 3" in random.manifest.model  # so that nothing takes it for the real model
    assert "random" not in real.manifest.model
    assert random.manifest.weights_fingerprint != real.manifest.weights_fingerprint
    a, b = (next(cache.head(50, 50)) for cache in (real, random))
    assert torch.equal(a.tokens, b.tokens)
    gap = (a.acts - b.acts).norm() / a.acts.norm()
    assert gap > 0.5


def test_a_misspelled_choice_does_not_draw_everything() -> None:
    with pytest.raises(UserError, match="which='all_but_embeddings' is not one of all, all-but-embeddings"):
        RandomWeights("all_but_embeddings")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_model_gives_the_same_cache_again(tmp_path: Path, text: Path, family: str) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    model = load_model(folder)
    config = HarvestConfig(
        tokens=700, context_length=16, held_out=0.3, dtype="float32", shard_bytes=1 << 13, pass_tokens=160
    )
    cache = harvest(model, HOOK, text, tmp_path / "cache", config)
    assert len(cache.manifest.shards) > 1
    again = harvest_again(load_model(folder), cache, tmp_path / "again")
    assert again.manifest.held_out_from == cache.manifest.held_out_from
    assert again.manifest.train_until == cache.manifest.train_until
    rows = torch.arange(cache.n_rows)
    one, two = cache.read(rows), again.read(rows)
    assert torch.equal(one.tokens, two.tokens)
    torch.testing.assert_close(one.acts, two.acts, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.documents(), again.documents())
    assert list(again.vocabulary) == list(cache.vocabulary)
    random = harvest_again(load_model(folder, random_weights=RandomWeights()), cache, tmp_path / "random")
    assert random.fingerprint != cache.fingerprint
    assert torch.equal(random.read(rows).tokens, one.tokens)

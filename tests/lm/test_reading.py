"""Reading models: nothing is reached, installed or run; whatever cannot be read is refused in one line."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.errors import UserError
from saelab.lm import load_hf_model, load_model, model_name, weights_fingerprint
from tests import tiny_lm


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network and no other programs: TransformerLens would run pip for a preprocessor."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"reached for the outside: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    yield


def one_line(load: Any, folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert "reached for the outside" not in str(caught.value)
    return str(caught.value)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def unknown_type(folder: Path) -> None:
    edit(folder / "config.json", model_type="nobody-knows", architectures=["NobodyForCausalLM"])


def own_code(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('was run')")
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit(folder / "config.json", model_type="mine", auto_map=auto)


def truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def missing_shard(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-00002*.safetensors"))[0].unlink()


def missing_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    import pickle

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": object()}))


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def scales_without_settings(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BROKEN = [
    (scales_without_settings, r"holds quantised weights \(model\.layers\.0\.mlp\.up_proj\.weight_scale_inv\)"),
    (unknown_type, "nobody-knows"),
    (own_code, "runs no code from a model's files"),
    (truncated, "cannot load model"),
    (missing_shard, "cannot load model"),
    (missing_tensor, r"no weights for model\.layers\.2\.mlp\.up_proj\.weight"),
    (no_weights, "cannot load model"),
    (pickled, "cannot load model"),
    (no_json, "cannot load model"),
]


@pytest.mark.parametrize(("breaks", "says"), BROKEN, ids=[breaks.__name__ for breaks, _ in BROKEN])
def test_a_broken_folder_is_one_line(breaks: Any, says: str, tmp_path: Path) -> None:
    import re

    folder = tiny_lm.save_llama(tmp_path / "m")
    breaks(folder)
    for load in (load_model, load_hf_model):
        assert re.search(says, one_line(load, folder))


def test_weights_that_the_model_does_not_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_lm.save_llama(tmp_path / "m")
    load_hf_model(folder, device="cpu")
    assert "does not use" not in caplog.text
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    load_hf_model(folder, device="cpu")
    assert f"does not use: model.layers.{config['num_hidden_layers']}." in caplog.text


def test_a_folder_without_tokenizer_serves_evaluation_only(tmp_path: Path) -> None:
    folder = tiny_lm.save_llama(tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "cannot load model" in one_line(load_model, folder)
    assert load_hf_model(folder, device="cpu").config.model_type == "llama"


def other_models() -> dict[str, tuple[Any, str]]:
    import transformers as tf

    bert = tf.BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    llama = tf.LlamaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    t5 = tf.T5Config(vocab_size=320, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24)
    return {
        "bert": (tf.BertForMaskedLM(bert), "BertForMaskedLM, which is no causal language model"),
        "bert base": (tf.BertModel(bert), "BertModel, which has no language-model head"),
        "t5": (tf.T5ForConditionalGeneration(t5), "T5ForConditionalGeneration, an encoder-decoder"),
        "headless": (tf.LlamaModel(llama), "LlamaModel, which has no language-model head"),
        "classifier": (tf.LlamaForSequenceClassification(llama), "LlamaForSequenceClassification, which is no causal"),
    }


@pytest.mark.parametrize("kind", ["bert", "bert base", "t5", "headless", "classifier"])
def test_what_is_no_causal_language_model_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model, says = other_models()[kind]
    model.save_pretrained(tmp_path)
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    for load in (load_model, load_hf_model):
        assert says in one_line(load, tmp_path)


def test_weights_without_their_head_are_refused_not_completed_at_random(tmp_path: Path) -> None:
    model, _ = other_models()["headless"]
    model.save_pretrained(tmp_path)
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["LlamaForCausalLM"])
    assert "no language-model head (lm_head.weight)" in one_line(load_model, tmp_path)


def test_a_multimodal_folder_is_read_without_installing_its_preprocessor(tmp_path: Path) -> None:
    folder = tiny_lm.save_gemma3_multimodal(tmp_path / "m")
    model, plain = load_model(folder, device="cpu"), load_hf_model(folder, device="cpu")
    assert type(plain).__name__ == "Gemma3ForConditionalGeneration"
    assert weights_fingerprint(model) == weights_fingerprint(plain)
    tokens = torch.randint(2, 320, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_without_bos_gets_none(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from saelab.lm.tokens import token_ids

    folder = tiny_lm.save_qwen2(tmp_path / "m")
    model, own = load_model(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)
    expected = own("the cat sat")["input_ids"]
    assert expected[0] != own.eos_token_id
    assert token_ids(model.tokenizer, "the cat sat") == token_ids(own, "the cat sat") == expected
    assert model.to_tokens("the cat sat").tolist() == [expected]


@pytest.mark.parametrize("save", [tiny_lm.save_qwen2, tiny_lm.save_gpt2, tiny_lm.save_llama])
def test_texts_begin_alike_on_a_bridge_that_the_user_booted(save: Any, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saelab.harvesting import HarvestConfig, harvest
    from saelab.lm.tokens import token_ids
    from saelab.steering import generate

    folder = save(tmp_path / "m")
    bridge, own = TransformerBridge.boot_transformers(str(folder), device="cpu"), AutoTokenizer.from_pretrained(folder)
    start = [] if own.bos_token_id is None else [own.bos_token_id]
    text = own("the cat sat", add_special_tokens=False)["input_ids"]
    assert token_ids(bridge.tokenizer, "the cat sat") == start + text
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert generate(bridge, "the cat sat", max_new_tokens=5) == generate(
        plain, "the cat sat", tokenizer=own, max_new_tokens=5
    )
    (tmp_path / "t.txt").write_text(tiny_lm.sentences(60))
    config = HarvestConfig(tokens=200, context_length=20, held_out=0)
    cache = harvest(bridge, "blocks.0.hook_resid_post", tmp_path / "t.txt", tmp_path / "c", config)
    assert cache.manifest.bos == ("context" if start else "none")
    tokens, _ = next(iter(cache.contexts("all")))
    assert tokens[: len(start)].tolist() == start and (start or int(tokens[0]) != own.eos_token_id)


def test_names_that_are_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file" in one_line(load_model, file)
    with pytest.raises(UserError, match="leave it out"):
        load_model(tiny_lm.save_llama(tmp_path / "m"), revision="v1")


def test_a_folder_is_named_by_its_path(tmp_path: Path) -> None:
    folder = tiny_lm.save_gpt2(tmp_path / "m")
    for load in (load_model, load_hf_model):
        assert model_name(load(folder, device="cpu")) == (str(folder.resolve()), "")


def test_a_device_map_places_the_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder, tokens = tiny_lm.save_llama(tmp_path / "m"), torch.randint(2, 320, (1, 9))
    model = load_model(folder, device_map={"": "cpu"})
    with torch.no_grad():
        expected = load_hf_model(folder, device="cpu")(input_ids=tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)

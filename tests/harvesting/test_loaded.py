"""Harvesting models that were quantised or adapted after loading, against Hugging Face's own hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab import HarvestConfig, evaluate, harvest
from saelab.evaluation import EvaluateConfig
from saelab.lm import load_hf_model, load_model
from saelab.sae import build
from saelab.steering import Add, SteeringVector, generate
from tests import tiny_lm

HOOK = "blocks.1.hook_resid_post"
SAVES = {"llama": tiny_lm.save_llama, "qwen2": tiny_lm.save_qwen2, "gemma3": tiny_lm.save_gemma3}
CONFIG = HarvestConfig(tokens=1024, context_length=32, held_out=0.2, dtype="float32")


@pytest.fixture(params=list(SAVES))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(tiny_lm.sentences(900))
    return SAVES[request.param](tmp_path / "model")


def with_tokenizer(model: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model


def expected_rows(model: Any, layer: nn.Module, tokens: Tensor) -> Tensor:
    """Hugging Face's activations ``[context, position, d]`` of all contexts in one pass."""
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        layer.register_forward_hook(lambda _m, _a, o: seen.append(o[0] if isinstance(o, tuple) else o)),
    ):
        model(input_ids=tokens)
    return seen[0]


def check(model: Any, layer: nn.Module, folder: Path, other: Any) -> None:
    """Its cache holds its activations, evaluate takes it and refuses ``other``, and it is steered."""
    cache = harvest(model, HOOK, folder.parent / "text.txt", folder.parent / "cache", CONFIG)
    # All in one pass, because torch's int8 layers quantise their inputs by the largest of the pass.
    tokens, rows = (torch.stack(column) for column in zip(*cache.contexts("all")))
    expected = expected_rows(model, layer, tokens)[rows >= 0]
    torch.testing.assert_close(cache.read(rows[rows >= 0]).acts, expected, rtol=1e-4, atol=1e-4)
    sae, config = build("topk", d_in=cache.d_in, d_sae=32, k=4).eval(), EvaluateConfig(lm_tokens=64)
    assert evaluate(sae, cache, model, config).metrics["ce_loss_without_sae"].value > 0
    with pytest.raises(ValueError, match=r"another model .* weights \("):
        evaluate(sae, cache, other, config)
    vector = SteeringVector.from_tensor(torch.ones(cache.d_in), HOOK)
    prompt = "the cat sat on"
    assert generate(model, prompt, Add(vector, 30.0), max_new_tokens=8) != generate(model, prompt, max_new_tokens=8)


@pytest.mark.filterwarnings("ignore")
def test_an_int8_model_is_harvested_evaluated_and_steered(folder: Path) -> None:
    whole = load_hf_model(folder, device="cpu")
    quantised: Any = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)
    check(with_tokenizer(quantised, folder), quantised.model.layers[1], folder, load_hf_model(folder, device="cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["model", "folder"])
def test_an_adapted_model_is_harvested_evaluated_and_steered(folder: Path, given: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(load_hf_model(folder, device="cpu"), config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    base, model = load_hf_model(folder, device="cpu"), with_tokenizer(made, folder)
    layer = made.get_base_model().model.layers[1]
    if given == "folder":
        made.save_pretrained(tmp_path / "adapter")
        model = load_model(tmp_path / "adapter", device="cpu")
        assert model.tokenizer is not None
        tokens = torch.arange(5, 25)[None]
        expected = expected_rows(made, layer, tokens)
        plain = load_hf_model(tmp_path / "adapter", device="cpu")
        torch.testing.assert_close(expected_rows(plain, plain.model.layers[1], tokens), expected, rtol=1e-4, atol=1e-4)
        model, layer = with_tokenizer(plain, folder), plain.model.layers[1]
    check(model, layer, folder, base)


@pytest.mark.filterwarnings("ignore")
def test_the_bridge_of_an_adapter_is_harvested_as_the_adapted_model(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    made = peft.get_peft_model(load_hf_model(folder, device="cpu"), config).eval()
    made.save_pretrained(tmp_path / "adapter")
    cache = harvest(
        load_model(tmp_path / "adapter", device="cpu"), HOOK, folder.parent / "text.txt", tmp_path / "cache", CONFIG
    )
    assert cache.manifest.model == str((tmp_path / "adapter").resolve())
    tokens, rows = (torch.stack(column) for column in zip(*cache.contexts("all")))
    expected = expected_rows(made, made.get_base_model().model.layers[1], tokens)[rows >= 0]
    torch.testing.assert_close(cache.read(rows[rows >= 0]).acts, expected, rtol=1e-3, atol=1e-3)

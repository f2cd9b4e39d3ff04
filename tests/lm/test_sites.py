"""One place by every name: bridges and plain models of several families find the same module for a hook name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from saelab.errors import UserError
from saelab.lm import load_model, locate
from saelab.lm.sites import blocks, underlying, width
from tests import tiny_lm

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(vocab_size=320, num_key_value_heads=2, **SIZES)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(vocab_size=320, num_key_value_heads=2, head_dim=8, **SIZES)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=320, **SIZES)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
}
POINTS = ["hook_resid_pre", "hook_resid_post", "hook_in", "hook_out", "hook_attn_out", "hook_mlp_out", "mlp.hook_out"]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A plain model and a bridge over the same weights."""
    cls, config = FAMILIES[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, None
    cls(config).save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return cls.from_pretrained(folder).eval(), load_model(str(folder))


def read(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = locate(model, name).register(lambda x: seen.append(x.clone()))
    try:
        underlying(model)(input_ids=ids)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("point", POINTS)
def test_a_name_means_one_place(models: tuple[Any, Any], point: str) -> None:
    plain, bridge = models
    name, ids = f"blocks.1.{point}", torch.tensor([[3, 50, 7, 200]])
    there, here = locate(plain, name), locate(bridge, name)
    assert (there.path, there.side) == (here.path, here.side)
    expected = bridge.run_with_cache(ids)[1][name]
    # Eager and fused attention add in another order.
    torch.testing.assert_close(read(plain, name, ids), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(read(bridge, name, ids), expected)
    if here.side == "out":
        assert torch.equal(read(bridge, here.path, ids), expected)


def test_what_is_put_there_is_what_the_model_goes_on_with(models: tuple[Any, Any]) -> None:
    ids = torch.tensor([[3, 50, 7, 200]])
    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"):
        logits = []
        for model in models:
            handle = locate(model, name).register(lambda x: x.flip(-1))
            logits.append(underlying(model)(input_ids=ids).logits)
            handle.remove()
        plain = underlying(models[0])(input_ids=ids).logits
        assert not torch.allclose(logits[0], plain, atol=1e-3)
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_sizes(models: tuple[Any, Any]) -> None:
    for model in models:
        assert (width(model), len(blocks(model)[1])) == (32, 3)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern"])
def test_a_place_that_cannot_be_replaced_is_refused(models: tuple[Any, Any], name: str) -> None:
    with pytest.raises(UserError, match=r"no place for|nothing can be put in its place|has no hook point"):
        locate(models[0], name)
    with pytest.raises(UserError, match=r"nothing can be put in its place|has no hook point"):
        locate(models[1], name)


def test_unknown_names_come_with_near_ones(models: tuple[Any, Any]) -> None:
    for model in models:
        with pytest.raises(UserError, match="has no hook point 'blok'"):
            locate(model, "blok")

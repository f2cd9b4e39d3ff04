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
    MixtralConfig,
    MixtralForCausalLM,
)

from saelab.errors import UserError
from saelab.lm import check_replaceable, load_model, locate
from saelab.lm.hook_names import side_of
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
POINTS += ["attn.hook_z", "attn.o.hook_in", "mlp.hook_post", "mlp.out.hook_in"]
# The linear maps that end attention and MLP of block 1: paths and widths of their inputs.
PROJECTIONS = {
    "llama": (("model.layers.1.self_attn.o_proj", 32), ("model.layers.1.mlp.down_proj", 48)),
    "gemma2": (("model.layers.1.self_attn.o_proj", 32), ("model.layers.1.mlp.down_proj", 48)),
    "neox": (("gpt_neox.layers.1.attention.dense", 32), ("gpt_neox.layers.1.mlp.dense_4h_to_h", 48)),
    "gpt2": (("transformer.h.1.attn.c_proj", 32), ("transformer.h.1.mlp.c_proj", 128)),
}


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
    with locate(model, name).register(model, lambda x: seen.append(x.clone())):
        underlying(model)(input_ids=ids)
    return seen[0]


@pytest.mark.parametrize("point", POINTS)
def test_a_name_means_one_place(models: tuple[Any, Any], point: str) -> None:
    plain, bridge = models
    name, ids = f"blocks.1.{point}", torch.tensor([[3, 50, 7, 200]])
    there, here = locate(plain, name), locate(bridge, name)
    assert (there.path, there.side) == (here.path, here.side)
    expected = bridge.run_with_cache(ids)[1][name].flatten(2)  # the bridge shows attention head by head
    # Eager and fused attention add in another order.
    torch.testing.assert_close(read(plain, name, ids), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(read(bridge, name, ids), expected)
    if here.side == "out":
        assert torch.equal(read(bridge, here.path, ids), expected)


@pytest.mark.parametrize("point", ["attn.hook_z", "mlp.hook_post"])
def test_the_input_of_a_projection_is_read_and_replaced(
    models: tuple[Any, Any], point: str, request: pytest.FixtureRequest
) -> None:
    """Against a forward pre-hook of torch on the module that the model's authors call so."""
    (attention, mlp), ids = PROJECTIONS[request.node.callspec.params["models"]], torch.tensor([[3, 50, 7, 200]])
    path, d_in = attention if point == "attn.hook_z" else mlp
    plain, name = models[0], f"blocks.1.{point}"
    seen: list[torch.Tensor] = []

    def flip(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        seen.append(args[0].clone())
        return (args[0].flip(-1),)

    with torch.no_grad(), plain.get_submodule(path).register_forward_pre_hook(flip):
        expected = plain(input_ids=ids).logits
    for model in models:
        site = check_replaceable(locate(model, name))
        assert (site.path, site.side, site.width(model)) == (path, "in", d_in)
        # Eager and fused attention add in another order.
        torch.testing.assert_close(read(model, name, ids), seen[0], rtol=1e-4, atol=1e-5)
        with torch.no_grad(), site.register(model, lambda x: x.flip(-1)):
            logits = underlying(model)(input_ids=ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(logits, underlying(model)(input_ids=ids).logits, atol=1e-3)


def test_a_bridge_that_computes_past_its_modules_is_not_edited_there(tmp_path: Path) -> None:
    model = load_model(tiny_lm.save_gpt2(tmp_path / "m"), device="cpu")
    model.enable_compatibility_mode()
    for name in ("blocks.1.attn.o.hook_in", "blocks.1.mlp.out.hook_in"):
        with pytest.raises(UserError, match="cannot be replaced"):
            check_replaceable(locate(model, name))


def test_a_mixture_of_experts_has_no_one_projection() -> None:
    sizes = SIZES | {"num_local_experts": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=320, **sizes))
    with pytest.raises(UserError, match="mixture of experts"):
        locate(model, "blocks.1.mlp.hook_post")
    assert locate(model, "blocks.1.attn.hook_z").path == "model.layers.1.self_attn.o_proj"


def test_the_side_of_an_old_manifest_follows_from_the_name(models: tuple[Any, Any]) -> None:
    for point in POINTS:
        assert side_of(f"blocks.1.{point}") == locate(models[0], f"blocks.1.{point}").side
    assert side_of(locate(models[0], "blocks.1.hook_resid_post").path) == "out"
    assert side_of("blocks.1.ln1.hook_normalized") == "inner"


def test_what_is_put_there_is_what_the_model_goes_on_with(models: tuple[Any, Any]) -> None:
    ids = torch.tensor([[3, 50, 7, 200]])
    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"):
        logits = []
        for model in models:
            with locate(model, name).register(model, lambda x: x.flip(-1)):
                logits.append(underlying(model)(input_ids=ids).logits)
        plain = underlying(models[0])(input_ids=ids).logits
        assert not torch.allclose(logits[0], plain, atol=1e-3)
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_sizes(models: tuple[Any, Any]) -> None:
    for model in models:
        assert (width(model), len(blocks(model)[1])) == (32, 3)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern"])
def test_a_place_that_cannot_be_replaced_is_refused(models: tuple[Any, Any], name: str) -> None:
    with pytest.raises(UserError, match=r"read the same input|cannot be replaced|has no hook point"):
        check_replaceable(locate(models[0], name))
    with pytest.raises(UserError, match=r"read the same input|cannot be replaced|has no hook point"):
        check_replaceable(locate(models[1], name))


def test_unknown_names_come_with_near_ones(models: tuple[Any, Any]) -> None:
    for model in models:
        with pytest.raises(UserError, match="has no hook point 'blok'"):
            locate(model, "blok")

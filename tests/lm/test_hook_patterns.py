"""Patterns of hook points, on models of two layouts."""

from __future__ import annotations

import pytest

from saelab.errors import UserError
from saelab.lm import load_hf_model
from saelab.lm.hook_patterns import at_layer_of, expand, is_pattern, matching
from tests import tiny_lm

RESID = "hook_resid_post"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_hf_model(str(tiny_lm.save_llama(tmp_path_factory.mktemp("llama"))))  # 4 layers


def resid(*layers):
    return [f"blocks.{layer}.{RESID}" for layer in layers]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [("*", (0, 1, 2, 3)), ("1-2", (1, 2)), ("3,0", (0, 3)), ("0-3:2", (0, 2)), ("0,2-3", (0, 2, 3)), ("2", (2,))],
)
def test_layers_of_a_pattern(llama, pattern, layers):
    assert expand(llama, [f"blocks.{pattern}.{RESID}"]) == resid(*layers)
    assert is_pattern(f"blocks.{pattern}.{RESID}") == (pattern != "2")


def test_lists_paths_and_other_parts(llama):
    assert expand(llama, [*resid(3), "blocks.0-1.hook_mlp_out", *resid(3)]) == [
        *resid(3), "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out",
    ]  # fmt: skip
    assert expand(llama, ["model.layers.*.mlp"]) == [f"model.layers.{i}.mlp" for i in range(4)]
    found = expand(llama, ["blocks.2.hook_*_out"])
    assert found == ["blocks.2.hook_attn_out", "blocks.2.hook_mlp_out"]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (f"blocks.2-9.{RESID}", "the model has 4 blocks, 0 to 3, and no 9"),
        (f"blocks.3-1.{RESID}", "3-1 is no range of layers"),
        (f"blocks.0-3:0.{RESID}", "0-3:0 is no range of layers"),
        ("blocks.*.hook_nothing*", "no hook point of the model matches"),
    ],
)
def test_refusals(llama, pattern, why):
    with pytest.raises(UserError, match=why):
        expand(llama, [pattern])


def test_names_are_matched_by_layer():
    names = ["blocks.10.a", "blocks.2.a", "blocks.2.b", "tokens"]
    assert matching("blocks.*.a", names) == ["blocks.2.a", "blocks.10.a"]
    assert matching("blocks.1-9.*", names) == ["blocks.2.a", "blocks.2.b"]
    assert matching("blocks.2.b", names) == ["blocks.2.b"] and matching("blocks.3.b", names) == []
    assert at_layer_of("blocks.*.b", "blocks.2.a") == "blocks.2.b"
    with pytest.raises(UserError, match="takes the layer of tokens"):
        at_layer_of("blocks.*.b", "tokens")

"""A norm's output without its gain, which transcoders of models with folded norms read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab import load_model
from saelab.attribution import attribute
from saelab.errors import UserError
from saelab.lm.norms import norm_parts
from saelab.lm.route import route
from saelab.lm.sites import check_replaceable, locate, underlying
from saelab.runs import Run
from tests import tiny_lm
from tests.attribution import tiny
from tests.attribution.test_transcoders import transcoders
from tests.zoo.families import FAMILIES

NAME = "blocks.1.ln2.hook_normalized"
IDS = torch.arange(5, 15)[None]


def read(model: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    with locate(model, name).register(model, lambda x: seen.append(x.clone())):
        underlying(model)(IDS)
    return seen[0]


def by_hand(plain: Any) -> Tensor:
    """The formula of a norm without weights, in double precision, on what the norm of the block's MLP reads."""
    norm, seen = locate(plain, NAME).module(plain), []
    handle = norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
    with torch.no_grad():
        plain(IDS)
    handle.remove()
    x = seen[0] - seen[0].mean(-1, keepdim=True) * isinstance(norm, torch.nn.LayerNorm)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "pythia", "gemma2", "glm4", "bloom"])
def test_it_is_what_the_mlp_reads_but_for_gain_and_offset(name: str) -> None:
    plain = tiny.model(name, torch.float32)
    site = locate(plain, NAME)
    parts = norm_parts(site.module(plain), torch.zeros(site.width(plain) or 0))
    again = read(plain, NAME) * parts.weight + parts.bias
    assert torch.allclose(again, read(plain, "blocks.1.mlp.hook_in"), atol=1e-5)


def test_a_family_with_norms_behind_its_sublayers_has_no_such_place() -> None:
    with pytest.raises(UserError, match="no hook point"):
        locate(tiny.model("olmo2", torch.float32), NAME)


@torch.no_grad()
def test_a_plain_model_shows_it() -> None:
    plain = tiny.model("gemma2", torch.float32)
    expected, site = by_hand(plain), locate(plain, NAME)
    assert (read(plain, NAME) - expected).norm() < 1e-6 * expected.norm()
    gained = read(plain, "blocks.1.mlp.hook_in")
    assert (gained - expected).norm() > 0.1 * expected.norm(), "the gain is far from 1"
    assert site.width(plain) == expected.shape[-1]
    with pytest.raises(UserError, match="cannot be replaced"):
        check_replaceable(site)


@torch.no_grad()
def test_a_bridge_shows_the_same(tmp_path: Path) -> None:
    bridge = load_model(str(tiny_lm.save_gemma3(tmp_path / "model")))
    seen = bridge.run_with_cache(IDS)[1][NAME]
    assert (read(bridge, NAME) - seen).norm() < 1e-5 * seen.norm()


@pytest.mark.parametrize("name", ["llama", "pythia", "gemma2", "glm4", "bloom"])
def test_a_norm_is_probed_once_and_again_when_it_has_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FAMILIES[name].build()
    norm = locate(plain, NAME).module(plain)
    with torch.inference_mode():
        read(plain, NAME)
    probes, deepcopy = [], copy.deepcopy
    monkeypatch.setattr("copy.deepcopy", lambda module: probes.append(module) or deepcopy(module))

    def close(tolerance: float) -> None:
        expected = by_hand(plain)
        assert (read(plain, NAME).double() - expected).norm() < tolerance * expected.norm()

    close(1e-5)
    read(plain, NAME).square().sum().backward()  # what was found in inference mode can take part in a gradient
    assert probes == []
    plain.to(torch.float64)
    close(1e-6)  # some norms compute in float32 whatever the model's precision
    norm.weight.data[::2] += 0.5  # through ``.data``, so that the weight's version is the same
    close(1e-6)
    plain.to(torch.bfloat16)
    close(0.02)
    close(0.02)
    assert probes == [norm] * 3


def test_the_gain_of_a_norm_must_be_known() -> None:
    plain = tiny.model("gemma2", torch.float32)
    weight = plain.model.layers[1].pre_feedforward_layernorm.weight
    before = weight.detach().clone()
    try:
        weight.data[3] = -1.0  # Gemma adds 1
        with pytest.raises(UserError, match="gain of 0"):
            read(plain, NAME)
    finally:
        weight.data.copy_(before)


def test_transcoders_that_read_there_make_a_frozen_model_linear() -> None:
    bare = [Run(r.sae, f"blocks.{i}.ln2.hook_normalized", hook_name_out=r.hook_name_out)
            for i, r in enumerate(transcoders(0, 1, 2, dtype=torch.float64))]  # fmt: skip
    plain = tiny.model("gemma2")
    assert not route(plain, bare[1].hook_name, bare[1].hook_name_out).same
    graph = attribute(bare, tiny.PROMPT, model=plain, check=0)  # whose norms compute in float32
    assert graph.mode == "frozen" and abs(graph.sums["gap"]) < 1e-5 and graph.drift < 1e-5
    assert any(edge.source.startswith("0_") and edge.target.startswith("1_") for edge in graph.edges)

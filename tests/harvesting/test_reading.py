"""Which of the two models is read: the plain one where it gives the same, the bridge where hooks are set on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab.harvesting import HarvestConfig, harvest
from saelab.harvesting.activations import Reader
from saelab.lm import load_model, locate
from saelab.lm.structure import inside
from tests import tiny_lm
from tests.zoo.families import save

HOOK = "blocks.1.hook_resid_post"
CONFIG = HarvestConfig(tokens=400, context_length=16, held_out=0.3, dtype="float32")


def without_a_head(z: Tensor, hook: Any) -> Tensor:
    """Head 2 of every token but the first, whose huge norm hides the others from a comparison of whole contexts."""
    z = z.clone()
    z[:, 1:, 2] = 0.0
    return z


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_hooks_on_the_bridge_are_honoured(name: str, tmp_path: Path) -> None:
    bridge: Any = load_model(save(name, tmp_path / "m"), device="cpu")
    with torch.no_grad():  # a first token of huge norm, as real models have
        bridge.original_model.get_input_embeddings().weight[0] *= 1e4
    (tmp_path / "t.txt").write_text(tiny_lm.sentences(400))
    bridge.add_hook("blocks.0.attn.hook_z", without_a_head)
    cache = harvest(bridge, HOOK, tmp_path / "t.txt", tmp_path / "ablated", CONFIG)
    tokens, rows = next(cache.contexts("held_out"))
    expected = bridge.run_with_cache(tokens[None])[1][HOOK][0]
    torch.testing.assert_close(cache.read(rows[rows >= 0]).acts, expected[rows >= 0], rtol=1e-4, atol=1e-4)
    bridge.reset_hooks()
    whole = harvest(bridge, HOOK, tmp_path / "t.txt", tmp_path / "whole", CONFIG)
    gap = (whole.read(rows[rows >= 0]).acts - expected[rows >= 0]).norm(dim=-1) / expected[rows >= 0].norm(dim=-1)
    assert gap.min() > 1e-3


def test_a_hook_of_torch_on_a_module_of_the_bridge_is_honoured(tmp_path: Path) -> None:
    bridge: Any = load_model(save("llama", tmp_path / "m"), device="cpu")
    ids = torch.randint(2, 300, (2, 8))
    reader = Reader(bridge, [locate(bridge, HOOK)])
    assert reader.use_plain_model(ids)
    with bridge.blocks[0].mlp.register_forward_hook(lambda _, __, out: out * 0.5):
        reader = Reader(bridge, [locate(bridge, HOOK)])
        assert not reader.use_plain_model(ids)
        (found,) = reader.activations(ids)
        torch.testing.assert_close(found, bridge.run_with_cache(ids)[1][HOOK])


def test_a_difference_in_the_stored_rows_alone_decides(tmp_path: Path) -> None:
    """The plain model is compared on the rows that are kept: the first token, of huge norm, must not hide them."""
    bridge: Any = load_model(save("llama", tmp_path / "m"), device="cpu")
    with torch.no_grad():
        bridge.original_model.get_input_embeddings().weight[0] *= 1e5
    ids = torch.cat([torch.zeros(2, 1, dtype=torch.int64), torch.randint(2, 300, (2, 8))], dim=1)
    plain = Reader(bridge, [locate(bridge, HOOK)])
    assert plain.use_plain_model(ids, skip_first=1)
    inside(bridge.blocks[0].mlp).act_fn = nn.Tanh()  # an edit that is no hook
    assert not Reader(bridge, [locate(bridge, HOOK)]).use_plain_model(ids, skip_first=1)


def test_a_plain_model_is_harvested(tmp_path: Path) -> None:
    model: Any = load_model(save("biogpt", tmp_path / "m"), device="cpu")
    assert not hasattr(model, "original_model")  # TransformerLens does not know it
    (tmp_path / "t.txt").write_text(tiny_lm.sentences(400))
    cache = harvest(model, HOOK, tmp_path / "t.txt", tmp_path / "c", CONFIG)
    assert (cache.manifest.hf_hook_name, cache.hook_name) == ("biogpt.layers.1", HOOK)

"""A plain Hugging Face model is spliced where its cache was harvested, whatever place that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.harvesting import HarvestConfig, harvest, harvest_many
from saelab.lm import load_hf_model, load_model
from saelab.sae import build
from tests import tiny_lm

# Module of the place in a Llama, and the torch hook that reaches it.
PLACES = {
    "blocks.1.hook_resid_pre": ("model.layers.1", "in"),
    "blocks.1.hook_resid_post": ("model.layers.1", "out"),
    "blocks.1.attn.hook_z": ("model.layers.1.self_attn.o_proj", "in"),
    "blocks.1.mlp.hook_post": ("model.layers.1.mlp.down_proj", "in"),
    "blocks.1.hook_mlp_out": ("model.layers.1.mlp", "out"),
}
CONFIG = HarvestConfig(tokens=400, context_length=10, held_out=0.3, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("places")
    tiny_lm.save_llama(root / "model")
    (root / "text.txt").write_text(tiny_lm.sentences(600))
    harvest_many(load_model(root / "model", device="cpu"), [*PLACES], root / "text.txt", root / "caches", CONFIG)
    return root


def sae_of(cache: ActivationCache) -> Any:
    sae = build("topk", d_in=cache.d_in, d_sae=32, k=4).eval()
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor(cache.manifest.mean))
    return sae


def oracle(model: Any, place: str, cache: ActivationCache, edit: Any) -> float:
    """Cross-entropy at replaced positions, by torch's own hook on the module and one pass per context."""
    path, side = PLACES[place]
    losses = []
    for tokens, rows in cache.contexts("held_out"):
        stored = (rows >= 0)[None, :, None]
        module = model.get_submodule(path)
        if side == "in":
            handle = module.register_forward_pre_hook(
                lambda _, args, stored=stored: (torch.where(stored, edit(args[0]), args[0]), *args[1:])
            )
        else:
            handle = module.register_forward_hook(lambda _, __, out, stored=stored: torch.where(stored, edit(out), out))
        with handle, torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, tokens[1:], reduction="none")[rows[:-1] >= 0])
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("old", [False, True], ids=["side recorded", "manifest of 0.1.0"])
@pytest.mark.parametrize("place", PLACES)
def test_a_plain_model_is_spliced_where_the_cache_says(folder: Path, tmp_path: Path, place: str, old: bool) -> None:
    path = folder / "caches" / place
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["hf_hook_name"], manifest["side"]) == PLACES[place]
    if old:
        path = tmp_path / "old"
        path.mkdir()
        for file in (folder / "caches" / place).iterdir():
            (path / file.name).symlink_to(file)
        (path / "manifest.json").unlink()
        del manifest["side"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    cache = ActivationCache(path)
    sae, model = sae_of(cache), load_hf_model(folder / "model", device="cpu")
    config = EvaluateConfig(density_tokens=0)
    got = evaluate(sae, cache, model, config)

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        return sae(x.flatten(0, -2)).view_as(x)

    for name, edit in (
        ("without_sae", lambda x: x),
        ("with_sae", reconstruct),
        ("with_zero_ablation", torch.zeros_like),
    ):
        # float32 logits of size about 10, attention kernels sum in another order
        assert got[f"ce_loss_{name}"] == pytest.approx(oracle(model, place, cache, edit), rel=1e-4), name
    assert abs(got["ce_loss_increase"]) > 1e-4  # the place is one the model listens to
    bridge = evaluate(sae, cache, load_model(folder / "model", device="cpu"), config)
    for name in ("ce_loss_with_sae", "kl_div_with_sae"):
        assert got[name] == pytest.approx(bridge[name], rel=1e-4)


def test_a_place_that_later_layers_see_past_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder / "model", device="cpu")
    cache = harvest(model, "blocks.1.hook_resid_mid", folder / "text.txt", tmp_path / "cache", CONFIG)
    for given in (model, load_hf_model(folder / "model", device="cpu")):
        with pytest.raises(UserError, match="cannot be replaced"):
            evaluate(sae_of(cache), cache, given)


def test_a_manifest_with_an_unknown_side_is_damaged(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "caches" / "blocks.1.hook_resid_pre" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"side": "up"}))
    with pytest.raises(UserError, match="side is 'up'"):
        ActivationCache(tmp_path)

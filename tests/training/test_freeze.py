"""A frozen dictionary or encoder: it stays as it was drawn, and the rest learns."""

from __future__ import annotations

import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import build
from saelab.training import TrainConfig, train
from tests.planted import activations

SIZES = {"topk": {"k": 3}, "batch_topk": {"k": 3}, "jump_relu": {}, "gated": {}, "matching_pursuit": {"n_steps": 3}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("frozen") / "cache", activations(1200, 16))


def trained(variant: str, freeze: str, cache: ActivationCache):
    torch.manual_seed(0)
    sae = build(variant, 16, 40, **SIZES[variant])
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    # Two epochs with dead latents, so that AuxK adds its rows to the gradient.
    last = train(sae, cache, TrainConfig(epochs=3, batch_size=100, lr=3e-3, dead_after=150, freeze=freeze))
    assert last is not None
    return sae, before, last.fvu


@pytest.mark.parametrize("variant", SIZES)
def test_a_frozen_dictionary_stays_and_the_rest_learns(cache: ActivationCache, variant: str) -> None:
    sae, before, fvu = trained(variant, "decoder", cache)
    torch.testing.assert_close(sae.W_dec.detach(), before["W_dec"], rtol=1e-6, atol=1e-7)
    assert not torch.equal(sae.b_dec.detach(), before["b_dec"])
    if "W_enc" in before:
        assert not torch.allclose(sae.W_enc.detach(), before["W_enc"], atol=1e-3)
    free, _, best = trained(variant, "none", cache)
    assert not torch.allclose(free.W_dec.detach(), before["W_dec"], atol=1e-3)
    assert best < fvu


def test_a_frozen_encoder_stays(cache: ActivationCache) -> None:
    sae, before, _ = trained("topk", "encoder", cache)
    torch.testing.assert_close(sae.W_enc.detach(), before["W_enc"], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(sae.W_dec.detach(), before["W_dec"], atol=1e-3)
    with pytest.raises(UserError, match="no encoder matrix"):
        trained("matching_pursuit", "encoder", cache)

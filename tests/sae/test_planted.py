"""Each variant, trained on sparse sums of planted directions, finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.data.synthetic import Planted
from saelab.sae import VARIANTS, build
from saelab.training import TrainConfig, train_steps

D_IN, FEATURES, D_SAE, L0 = 20, 24, 32, 2

# What differs from a budget of the true L0: penalties for so small a width, and the time that two phases need.
CONFIG = {
    "relu": {"l1": 0.3},
    "gated": {"l1": 1.0},
    "jump_relu": {"target_l0": L0},
    "matching_pursuit": {"n_steps": 3},
    "feature_choice": {"k": L0, "mutual_share": 0.7, "density_window": 50_000},
    "mutual_choice": {"k": L0, "density_window": 50_000},
}


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted(D_IN, FEATURES, l0=L0, zipf=0.3, seed=1)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_planted_directions_are_recovered(name: str, planted: Planted, tmp_path: Path) -> None:
    data = Planted(D_IN, FEATURES, l0=L0, zipf=0.3, signed=FEATURES, seed=1) if name == "abs_topk" else planted
    x, _ = data.sample(10_000, seed=2)
    cache = ActivationCache.from_tensors(tmp_path, x, grads=torch.randn(x.shape))
    sae = build(name, D_IN, D_SAE, **CONFIG.get(name, {"k": L0}))
    for step in train_steps(sae, cache, TrainConfig(epochs=8, batch_size=256, lr=5e-3, dead_after=3000)):
        assert step.fvu < 10
    cosines = data.directions @ torch.nn.functional.normalize(sae.W_dec.detach(), dim=1).T
    if sae.signed:
        cosines = cosines.abs()
    assert cosines.amax(dim=1).mean() > 0.9
    held_out = x[-500:]
    code = sae.encode(held_out)
    assert 0.5 * L0 < code.l0().double().mean() < 2.5 * L0
    error = (held_out - sae.decode(code)).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert error < 0.35

"""Fine-tuning goes on from the weights it is given."""

from __future__ import annotations

from pathlib import Path

import torch

from saelab import ActivationCache, build
from saelab.train import TrainConfig, adopt, train


def test_fine_tuning_starts_where_the_sae_is(tmp_path: Path) -> None:
    truth = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    active = (torch.rand(2048, 12) < 0.15) * (1 + torch.rand(2048, 12))
    cache = ActivationCache.from_tensors(tmp_path / "cache", 20 * active @ truth)
    config = TrainConfig(epochs=10, batch_size=128, lr=3e-3)
    sae = build("topk", d_in=8, d_sae=12, k=3)
    trained = list(train(sae, cache, config))[-1]
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    state = adopt(sae, cache)
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    again = list(train(sae, cache, TrainConfig(epochs=1, batch_size=128, lr=1e-4, warmup=0.0), state))
    # From scratch the first step has an FVU near 1.
    assert abs(again[0].fvu - trained.fvu) < 0.1
    assert again[-1].fvu < again[0].fvu + 0.05
    assert any(not torch.equal(value, weights[name]) for name, value in sae.state_dict().items())

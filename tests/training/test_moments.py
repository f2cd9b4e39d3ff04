"""Adam's moments in bfloat16: half the memory, the same training, and a run that goes on as it began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import build
from saelab.training import TrainConfig, fit_steps, start, train, train_steps
from saelab.training.checkpoints import latest_step
from tests.planted import activations

CONFIG = TrainConfig(epochs=4, batch_size=128, lr=3e-3, moments="bf16")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("moments") / "cache", activations(2000, 16))


def sae_of():
    torch.manual_seed(0)
    return build("topk", 16, 64, k=4)


def test_it_trains_as_well(cache: ActivationCache) -> None:
    last = [train(sae_of(), cache, replace(CONFIG, moments=moments)) for moments in ("fp32", "bf16")]
    assert last[0] is not None and last[1] is not None
    assert last[1].fvu == pytest.approx(last[0].fvu, rel=0.05) and last[1].fvu != last[0].fvu


def test_a_resumed_run_is_identical_and_keeps_its_moments(cache: ActivationCache, tmp_path: Path) -> None:
    for name, stop in (("whole", None), ("parts", 11)):
        steps = fit_steps(sae_of(), cache, CONFIG, tmp_path / name)
        for metrics in steps:
            if metrics.step == stop:
                steps.close()
    kept = latest_step(tmp_path / "parts")
    assert kept is not None
    state = load_file(kept / "train_state.safetensors")
    assert state["optimizer.W_enc.exp_avg_sq"].dtype == torch.bfloat16 == state["optimizer.b_dec.exp_avg"].dtype
    with pytest.raises(UserError, match="moments=fp32 differs from moments=bf16 of the run"):
        list(fit_steps(sae_of(), cache, replace(CONFIG, moments="fp32"), tmp_path / "parts", resume=True))
    for _ in fit_steps(sae_of(), cache, CONFIG, tmp_path / "parts", resume=True):
        pass
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_state_with_other_moments_is_refused(cache: ActivationCache) -> None:
    sae = sae_of()
    config = CONFIG.resolved(sae, cache)
    state = start(sae, cache, config)
    run = train_steps(sae, cache, config, state)
    next(run)
    run.close()
    with pytest.raises(UserError, match="moments=fp32, but the training state has moments in bf16; continue with bf16"):
        next(train_steps(sae, cache, replace(config, moments="fp32"), state))

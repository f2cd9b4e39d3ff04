"""A run whose rate is too high is stopped and named, also where nothing becomes infinite; what was good is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.sae import VARIANTS, build
from saelab.sae.weights import load_sae
from saelab.training import Diverged, TrainConfig, fit_steps, n_steps, train, train_steps
from saelab.training.checkpoints import latest_step
from saelab.training.divergence import DOUBTFUL, LIMIT, failure
from tests.planted import activations

D_IN, D_SAE = 16, 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    acts = activations(3000, D_IN)
    grads = torch.randn(acts.shape, generator=torch.Generator().manual_seed(1))
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("acts") / "cache", acts, grads=grads, held_out=0.1)


def sae_of(variant: str, d_in: int = D_IN):
    torch.manual_seed(0)
    return build(variant, d_in, D_SAE, l0=4)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("lr", [10.0, 1e3])
def test_a_rate_that_explodes_without_infinities_is_named(cache: ActivationCache, variant: str, lr: float) -> None:
    sae, config = sae_of(variant), TrainConfig(epochs=2, batch_size=128, lr=lr)
    remedy = re.escape(f"lower lr={lr:.2g}, to {lr / 10:.2g} say")
    with pytest.raises(Diverged, match=rf"(by|at) step \d+.*{remedy}"):
        train(sae, cache, config)
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize("variant", ["topk", "batch_topk", "gated", "matching_pursuit"])
def test_high_but_useful_rates_and_outliers_are_let_through(variant: str, tmp_path: Path) -> None:
    acts = activations(3000, D_IN)
    acts[::500] *= 300  # massive activations: a batch with one of them has many times the usual error
    acts = acts[torch.randperm(len(acts), generator=torch.Generator().manual_seed(0))]
    cache = ActivationCache.from_tensors(tmp_path / "outliers", acts, held_out=0.1)
    for lr in (1e-3, 1e-2):
        config = TrainConfig(epochs=3, batch_size=64, lr=lr)
        fvus = [metrics.fvu for metrics in train_steps(sae_of(variant), cache, config)]
        assert max(fvus) > 2 and len(fvus) == n_steps(cache, config)


def stop_after(cache: ActivationCache, folder: Path, step: int, factor: float):
    """Train with a checkpoint every 5 steps; after ``step`` the encoder is multiplied by ``factor``."""
    sae = sae_of("topk")
    steps = fit_steps(sae, cache, TrainConfig(epochs=2, batch_size=128, lr=1e-3), folder, checkpoint_steps=5)
    for metrics in steps:
        if metrics.step == step:
            with torch.no_grad():
                sae.W_enc.mul_(factor)
    return sae


def test_the_last_checkpoint_is_kept_and_can_be_gone_on_with(cache: ActivationCache, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"exploded by step 14: .*step_00000010 in the run folder is from before"):
        stop_after(cache, tmp_path / "run", 13, 1e4)
    kept = latest_step(tmp_path / "run")
    assert kept is not None and load_sae(kept).d_sae == D_SAE
    main(["train", str(cache.path), "--from", str(kept), "--out", str(tmp_path / "again"), "--lr", "1e-4"])
    assert load_sae(tmp_path / "again").d_sae == D_SAE
    with pytest.raises(Diverged, match="there is no checkpoint from before"):
        stop_after(cache, tmp_path / "early", 2, 1e4)


def test_a_checkpoint_is_not_replaced_while_the_error_explodes(cache: ActivationCache, tmp_path: Path) -> None:
    reference = max(1.0, cache.manifest.rms_norm**2 / cache.manifest.variance)
    with pytest.raises(Diverged):
        stop_after(cache, tmp_path / "run", 14, 6)
        raise Diverged("it recovered")
    step_15 = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[14])
    assert DOUBTFUL * reference < step_15["fvu"] < LIMIT * reference
    recovered = latest_step(tmp_path / "run")
    assert recovered is None or recovered.name != "step_00000015"


def test_the_reference_survives_a_resume(cache: ActivationCache, tmp_path: Path) -> None:
    config, sae = TrainConfig(epochs=2, batch_size=128, lr=1e-3), sae_of("jump_relu")
    with torch.no_grad():
        sae.W_enc.mul_(10)  # so that the error begins above 1
    for metrics in (steps := fit_steps(sae, cache, config, tmp_path / "run")):
        if metrics.step == 1:
            first = metrics.fvu
        if metrics.step == 3:
            steps.close()
    path = latest_step(tmp_path / "run")
    assert path is not None and json.loads((path / "train_state.json").read_text())["first_fvu"] == first > 1


def test_an_sae_that_collapsed_is_named_at_the_end(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sizes = ["--variant", "relu", "--batch-size", "128", "--d-sae", "64", "--epochs", "4", "--lr", "0.03"]
    main(["train", str(cache.path), "--out", str(tmp_path / "run"), "--l1", "1000", *sizes])
    assert "is no better than that of the mean activation: lr=0.03 or a" in capsys.readouterr().err.replace("\n", " ")
    main(["train", str(cache.path), "--out", str(tmp_path / "fine"), "--l1", "0.01", *sizes])
    assert "mean activation" not in capsys.readouterr().err
    assert failure(0.5, 1.0) == "" and "lr=1 " in failure(1.02, 1.0)

"""Numbers that stay on the device: the same run, the same log and the same refusals as where they are read at once.

No GPU is needed: the trainer is told that the CPU is to be left alone. Under the numba kernels the arithmetic is that
of the CPU, so the results must be the same to the bit; under Triton's interpreter it is that of a GPU.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import torch

from saelab import kernels
from saelab.data.cache import ActivationCache
from saelab.kernels.dispatch import obstacle
from saelab.sae import VARIANTS, build, mutual_choice
from saelab.training import Diverged, StepMetrics, TrainConfig, fit_steps, train, train_steps
from saelab.training import step as step_module
from saelab.training.checkpoints import latest_step
from tests.kernels.conftest import quicken_interpreter
from tests.planted import activations

D_IN, D_SAE = 16, 64
CONFIG = TrainConfig(epochs=3, batch_size=128, lr=3e-3, dead_after=700, k_aux=4, grad_clip=0.05, ema=0.9)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    acts = activations(3000, D_IN)
    grads = torch.randn(acts.shape, generator=torch.Generator().manual_seed(1))
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("later") / "cache", acts, grads=grads, held_out=0.1)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "leaves_numbers", lambda *_: True)


def sae_of(variant: str):
    torch.manual_seed(0)
    sae = build(variant, D_IN, D_SAE, l0=4)
    with torch.no_grad():
        sae.W_dec[: D_SAE // 4] *= -1  # with an encoder that points the other way they do not fire, and die
        getattr(sae, "b_enc", torch.zeros(D_SAE))[: D_SAE // 4] = -0.5
    return sae


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_run_is_the_same_to_the_bit(variant: str, cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for wait in (False, True):
        monkeypatch.setattr(step_module, "leaves_numbers", lambda *_, wait=wait: wait)
        sae, rows = sae_of(variant), []
        for metrics in train_steps(sae, cache, CONFIG):
            assert metrics.known is not wait
            rows.append(metrics)
        found.append(([metrics.row() for metrics in rows], sae.state_dict()))
    (rows, weights), (rows_later, weights_later) = found
    if any("auxk" in row for row in rows):
        # A list with living latents on it sums in another order.
        assert [list(row) for row in rows] == [list(row) for row in rows_later]
        for name in ("loss", "fvu", "auxk"):
            values = [[row.get(name, 0.0) for row in run] for run in (rows, rows_later)]
            assert values[0] == pytest.approx(values[1], rel=1e-3)
    else:
        assert rows == rows_later
        assert all(torch.equal(weights[name], weights_later[name]) for name in weights)


@pytest.mark.parametrize("variant", ["mutual_choice", "feature_choice"])
def test_what_may_become_under_used_is_listed_ahead(
    variant: str, cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutual_choice, "REFIT", 10)
    found = []
    for wait in (False, True):
        monkeypatch.setattr(step_module, "leaves_numbers", lambda *_, wait=wait: wait)
        sae = sae_of(variant)
        sae.under_used = 0.7
        found.append([metrics.row() for metrics in train_steps(sae, cache, CONFIG)])
    assert [list(row) for row in found[0]] == [list(row) for row in found[1]]
    assert any(row["aux_zipf"] != row.get("auxk", 0) for row in found[0] if "aux_zipf" in row), "not the dead alone"
    for name in ("loss", "fvu", "l0", "auxk", "aux_zipf"):
        values = [[row.get(name, 0.0) for row in run] for run in found]
        assert values[0] == pytest.approx(values[1], rel=2e-3), name


# Two of them have a threshold, and take the same kernels.
@pytest.mark.parametrize(
    "variant", ["topk", "batch_topk", pytest.param("jump_relu", marks=pytest.mark.minutes), "gated"]
)
def test_the_step_of_a_gpu_trains_as_that_of_a_cpu(variant: str, tmp_path: Path, later: None) -> None:
    """One gradient pass with projection and norms, Adam with the factor and the rows, dead latents from a list."""
    if obstacle("triton", "cpu") is not None:
        pytest.skip(str(obstacle("triton", "cpu")))
    quicken_interpreter()
    acts = activations(300, D_IN)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, grads=torch.randn(acts.shape), held_out=0.1)
    config, found = TrainConfig(epochs=1, batch_size=32, lr=3e-3, dead_after=60, k_aux=4, grad_clip=0.05), []
    for backend in ("numba", "triton"):
        sae = sae_of(variant)
        with kernels.use_backend(backend):
            steps = list(islice(train_steps(sae, cache, config), 4))
            found.append(([metrics.row() for metrics in steps], {k: v.clone() for k, v in sae.state_dict().items()}))
    (rows, weights), (rows_later, weights_later) = found
    for name in rows[-1]:
        values = [[row.get(name, 0.0) for row in run] for run in (rows, rows_later)]
        assert values[0] == pytest.approx(values[1], rel=2e-3, abs=1e-6), name
    # Adam divides by the gradient's own size: noise of a small gradient shows at the size of a step.
    for name, value in weights.items():
        assert torch.allclose(value, weights_later[name], atol=12 * 3e-3), name
        assert (value - weights_later[name]).abs().float().quantile(0.9) < 1e-4, name


def test_a_step_is_read_when_it_is_asked_for(cache: ActivationCache, later: None) -> None:
    run = train_steps(sae_of("topk"), cache, CONFIG)
    first, second, third = (next(run) for _ in range(3))
    assert not third.known and "not read yet" in repr(third) and third.step == 3 and third.tokens == 384
    assert 0 < second.fvu < 2 and first.known and third.known
    assert isinstance(third, StepMetrics) and third.row()["step"] == 3


@pytest.mark.parametrize("lr", [10.0, 1e3])
@pytest.mark.parametrize("variant", ["topk", "relu", "jump_relu", "matching_pursuit"])
def test_a_run_that_diverges_names_the_same_step(
    cache: ActivationCache, tmp_path: Path, variant: str, lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, config = [], TrainConfig(epochs=3, batch_size=128, lr=lr)
    for wait in (False, True):
        monkeypatch.setattr(step_module, "leaves_numbers", lambda *_, wait=wait: wait)
        sae, folder = sae_of(variant), tmp_path / str(wait)
        with pytest.raises(Diverged, match=r"(by|at) step \d+.*there is no checkpoint from before") as caught:
            train(sae, cache, config, folder)
        assert all(parameter.isfinite().all() for parameter in sae.parameters())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append((str(caught.value), rows))
    assert found[0] == found[1]
    step = re.search(r"step (\d+)", found[0][0])
    assert step is not None and int(step[1]) == len(found[0][1]) + 1


def test_the_flag_stops_the_update_of_the_step_that_failed(cache: ActivationCache, later: None) -> None:
    sae = sae_of("topk")
    run = train_steps(sae, cache, CONFIG)
    next(run)
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    before = sae.W_dec.detach().clone()
    for _ in range(3):
        last = next(run)
    assert torch.allclose(torch.nn.functional.normalize(before, dim=1), sae.W_dec, atol=1e-6)
    with pytest.raises(Diverged, match="not finite at step 2"):
        last.row()
    with pytest.raises(Diverged, match="not finite at step 2"):
        list(run)


def test_a_checkpoint_waits_for_the_numbers(cache: ActivationCache, tmp_path: Path, later: None) -> None:
    """No checkpoint of a step that diverged, and a log that holds every step up to the checkpoint."""
    steps = fit_steps(sae := sae_of("topk"), cache, CONFIG, tmp_path / "run", checkpoint_steps=5)
    for metrics in steps:
        if metrics.step == 5:
            assert metrics.known and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
        if metrics.step == 7:
            with torch.no_grad():
                sae.W_enc[:] = torch.nan
        if metrics.step == 9:
            break
    with pytest.raises(Diverged, match="not finite at step 8"):
        steps.close()
    kept = latest_step(tmp_path / "run")
    assert kept is not None and kept.name == "step_00000005"


@pytest.mark.parametrize(("variant", "stop"), [("topk", 3), ("topk", 6), ("mutual_choice", 14)])
def test_a_resumed_run_is_identical(
    cache: ActivationCache, tmp_path: Path, later: None, variant: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutual_choice, "REFIT", 10)
    for name, at in (("whole", None), ("parts", stop)):
        steps = fit_steps(sae_of(variant), cache, CONFIG, tmp_path / name, checkpoint_steps=4)
        for metrics in steps:
            if metrics.step == at:
                steps.close()
    for _ in fit_steps(sae_of(variant), cache, CONFIG, tmp_path / "parts", resume=True):
        pass
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()

"""A run that does not fit the memory of its GPU is refused before its first step, with what would fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import build
from saelab.training import TrainConfig, fit_steps, memory, train_steps
from saelab.training.memory import check_memory, step_bytes
from saelab.training.state import MOMENTS, make_optimizer

D_IN, D_SAE = 64, 4096


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU with so many free bytes, under the CPU's tensors."""
    found = {"bytes": 0}
    monkeypatch.setattr(memory, "free_bytes", lambda device: found["bytes"])
    return found


def needs(batch: int, d_sae: int = D_SAE) -> int:
    return sum(step_bytes(build("topk", D_IN, d_sae, k=8), batch))


def test_what_fits_is_not_refused(free: dict[str, int]) -> None:
    free["bytes"] = needs(512)
    check_memory(build("topk", D_IN, D_SAE, k=8), TrainConfig(batch_size=512))


def test_a_batch_that_would_fit_is_named_and_fits(free: dict[str, int]) -> None:
    free["bytes"] = needs(512) - 1
    sae = build("topk", D_IN, D_SAE, k=8)
    with pytest.raises(UserError, match=r"takes at least 0\.0 GB .* are free; batch_size=256 would fit") as error:
        check_memory(sae, TrainConfig(batch_size=512))
    assert "\n" not in str(error.value)
    check_memory(sae, TrainConfig(batch_size=256))


def test_a_width_that_would_fit_is_named_and_fits(free: dict[str, int]) -> None:
    free["bytes"] = step_bytes(build("topk", D_IN, D_SAE, k=8), 1)[0] // 2
    sae = build("topk", D_IN, D_SAE, k=8)
    with pytest.raises(UserError) as error:
        check_memory(sae, TrainConfig(batch_size=64))
    width = int(re.search(r"d_sae=(\d+) would fit", str(error.value)).group(1))  # pyright: ignore
    assert 256 <= width < D_SAE
    smaller = build("topk", D_IN, width, k=8)
    free["bytes"] += sum(p.nbytes for p in sae.parameters()) - sum(p.nbytes for p in smaller.parameters())
    check_memory(smaller, TrainConfig(batch_size=1))


def test_a_resumed_run_has_its_moments_already(free: dict[str, int]) -> None:
    sae, config = build("topk", D_IN, D_SAE, k=8), TrainConfig(batch_size=512)
    free["bytes"] = needs(512) - 8 * sum(p.numel() for p in sae.parameters())
    check_memory(sae, config, resumed=True)
    with pytest.raises(UserError, match="would fit"):
        check_memory(sae, config)


def test_moments_count_as_they_are_kept(free: dict[str, int]) -> None:
    sae = build("topk", D_IN, D_SAE, k=8)
    parameters = sum(p.numel() for p in sae.parameters())
    half = step_bytes(sae, 512, moments="bf16")
    assert step_bytes(sae, 512)[0] - half[0] == 4 * parameters
    free["bytes"] = sum(half)
    config = TrainConfig(batch_size=512, moments="bf16")
    check_memory(sae, config)
    with pytest.raises(UserError, match="would fit"):
        check_memory(sae, TrainConfig(batch_size=512))
    free["bytes"] -= 4 * parameters  # a resumed run's are there already
    check_memory(sae, config, resumed=True)
    free["bytes"] -= 1
    with pytest.raises(UserError, match="would fit"):
        check_memory(sae, config, resumed=True)


def test_what_the_plan_counts_are_the_moments_of_the_optimizer() -> None:
    for name in ("fp32", "bf16"):
        sae = build("topk", D_IN, 256, k=8)
        optimizer = make_optimizer(sae)
        optimizer.moments = MOMENTS[name]
        sae(torch.randn(8, D_IN)).sum().backward()
        optimizer.update()
        held = sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        assert held == memory.moment_bytes(name) * sum(p.numel() for p in sae.parameters())


def test_without_a_budget_half_of_the_latents_count(free: dict[str, int]) -> None:
    assert step_bytes(build("relu", D_IN, D_SAE), 512)[1] > 5 * step_bytes(build("topk", D_IN, D_SAE, k=8), 512)[1]


def test_the_memory_of_a_gpu_is_what_is_free_or_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory.free_bytes(torch.device("cuda", 0)) == 130
    assert memory.free_bytes(torch.device("cpu")) is None


def test_nothing_is_computed_or_written(free: dict[str, int], tmp_path: Path) -> None:
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(600, D_IN))
    sae = build("topk", D_IN, D_SAE, k=8)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    config = TrainConfig(epochs=1, batch_size=512)
    for steps in (train_steps(sae, cache, config), fit_steps(sae, cache, config, tmp_path / "run")):
        with pytest.raises(UserError, match="are free"):
            next(steps)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_anywhere_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity ...")

    monkeypatch.setattr("saelab.cli._dispatch", full)
    with pytest.raises(SystemExit) as error:
        main(["train"])
    assert error.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB.; use smaller batches or passes")
    monkeypatch.setattr("saelab.cli._dispatch", lambda args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])

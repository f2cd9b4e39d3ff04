"""The GPU's benchmark on a CPU in tiny sizes: all of it runs, red parity stops it, and the clock is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saelab import kernels
from saelab.bench.gpu import __main__ as bench
from saelab.bench.gpu import parity, speed
from tests.test_collection import HIDDEN, LACKING


def test_every_stage_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--budget", "600", "--out", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not [name for name, stage in found.items() if "skipped" in stage or "error" in stage]
    times = found["steps 8x16x96x4"]["milliseconds"]
    assert set(times) >= {"saelab, bf16", "saelab, fp32", "dense, bf16", "structure of sparsify, bf16"}
    assert found["steps 8x16x96x4"]["counts"]["operations"] > 20
    assert found["index"]["index_seconds"] > found["index"]["encode_seconds"] > 0
    runs = found["training from a cache"]
    assert all(runs[name]["last fvu"] < runs[name]["first fvu"] for name in ("topk auto", "topk fp32"))
    assert all(runs["two equal runs agree"].values())
    said = capsys.readouterr().out
    assert "parity: green" in said and "structure of sparsify" in said and "index of 96 latents" in said
    assert "stages that failed: none" in said


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    assert bench.main(["--device", "cpu", "--budget", "1", "--out", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "skipped" in found["steps 8x16x96x4"] and "skipped" in found["training from a cache"]


@pytest.mark.parametrize("broken", ["winner", "gradient", "repeat"])
def test_red_parity_stops_it(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    select, at = kernels.select_topk, kernels.pre_acts_at
    if broken == "winner":
        monkeypatch.setattr(
            kernels,
            "select_topk",
            lambda *a, **o: (c := select(*a, **o))._replace(indices=(c.indices + 1) % a[1].shape[1]),
        )
    elif broken == "gradient":
        monkeypatch.setattr(kernels, "pre_acts_at", lambda *a: at(*a).detach() + 0 * at(*a))
    else:  # as sums in the order of atomics do
        monkeypatch.setattr(kernels, "pre_acts_at", lambda *a: at(*a) * (1 + 1e-6 * torch.rand(())))
    monkeypatch.setattr(bench, "BACKENDS", ("numba",))
    assert bench.main(["--device", "cpu", "--budget", "600", "--out", str(tmp_path / "gpu.json")]) == 1
    said = capsys.readouterr().out
    assert "parity: red, nothing is timed" in said and "tokens/s" not in said


def test_a_stage_that_fails_does_not_end_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench.Report(tmp_path / "gpu.json", 60)
    report.stage("first", 1, lambda: 1 / 0)
    report.stage("second", 1, lambda: {"fine": 1})
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "ZeroDivisionError" in found["first"]["error"] and found["second"] == {"fine": 1}
    assert report.failed == ["first"]


def test_memory_that_a_kernel_forgets_is_poisoned() -> None:
    with parity.poisoned():
        assert torch.empty(3).isnan().all() and int(torch.empty(1, dtype=torch.int64)) == 2**40
        assert torch.ones(2).new_empty(2).isnan().all()
    assert parity.wide(torch.device("cpu"), 40, 90, 5)


def test_launches_and_waits_are_counted_by_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for CUDA, on a pretended profiler."""
    modes: list[str] = []

    class Profile:
        def __init__(self, activities: Any) -> None:
            pass

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[Any]:
            def event(kind: str) -> Any:
                spent = SimpleNamespace(elapsed_us=lambda: 300.0)
                return SimpleNamespace(device_type=f"DeviceType.{kind}", name="kernel", time_range=spent)

            return [*(event("CUDA") for _ in range(6)), event("CPU")]

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)

    def step() -> None:
        import warnings

        if modes == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    found = speed.counts(step, torch.device("cuda", 0))
    assert found["launches"] == 2 and found["host waits"] == 1 and modes == ["warn", "default"]
    assert found["busy milliseconds"] == pytest.approx(0.6)


def test_it_needs_little_more_than_pytorch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(names=LACKING))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-m", "saelab.bench.gpu", "--device", "cpu", "--budget", "1", "--out", "gpu.json"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr

"""The benchmark: nothing is timed on a red parity check, and its report can be read by a program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelab import kernels
from saelab.bench.kernels import __main__ as bench
from saelab.bench.kernels import parity as bench_parity

SMALL = ["--shape", "32x8x64x4", "--pursuit", "16x8x32x3", "--rounds", "1"]


def test_the_report_has_times_ratios_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert bench.main([*SMALL, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["backend"] == kernels.describe()
    shape = report["shapes"]["32x8x64x4"]
    assert shape["ratios"]["step, topk"] == 1.0 and set(shape["ratios"]) == set(shape["milliseconds"])
    assert "dense autograd, default Adam" in shape["ratios"] and shape["peak_megabytes"] < 150
    assert set(report["pursuit"]) == {"training", "evaluation"}
    assert "parity: green" in capsys.readouterr().out


def test_no_speed_is_shown_when_parity_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Break the selection: every second winner is replaced by its neighbour."""
    original = kernels.select_topk

    def broken(*args, **options):
        code = original(*args, **options)
        return code._replace(indices=(code.indices + 1) % args[1].shape[1])

    monkeypatch.setattr(kernels, "select_topk", broken)
    assert bench_parity.red_cases(kernels.backend(), "cpu")
    out = tmp_path / "bench.json"
    assert bench.main([*SMALL, "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "parity is red" in printed and " ms" not in printed and not out.exists()


def test_a_wrong_gradient_turns_parity_red(monkeypatch: pytest.MonkeyPatch) -> None:
    original = kernels.pre_acts_at
    monkeypatch.setattr(kernels, "pre_acts_at", lambda *args: original(*args).detach() + 0 * original(*args))
    assert bench_parity.red_cases(kernels.backend(), "cpu")

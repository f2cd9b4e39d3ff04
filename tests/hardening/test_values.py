"""NaN, infinite and zero activations: refused by name where they would spoil a result, else harmless."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache, build
from saelab.errors import UserError
from saelab.features import FeatureIndex
from saelab.sae.weights import load_sae
from tests.hardening.place import D_IN, TRAIN, call, refused

BAD = [float("nan"), float("inf"), float("-inf")]


def cache_of(folder: Path, acts: torch.Tensor) -> Path:
    ActivationCache.from_tensors(folder, acts, torch.arange(len(acts)) % 40, context_length=20, shard_rows=400)
    return folder


def poison(cache: Path, row: int, value: float) -> None:
    """Put a value into the stored activations behind the writer's back, as a damaged disk would."""
    path = cache / "shard_00000.safetensors"
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    start = 8 + length + json.loads(data[8 : 8 + length])["acts"]["data_offsets"][0] + 4 * D_IN * row
    data[start : start + 4] = struct.pack("<f", value)
    path.write_bytes(data)


@pytest.mark.parametrize("value", BAD)
def test_the_writer_refuses_what_is_not_finite(value: float, tmp_path: Path) -> None:
    acts = torch.randn(100, D_IN)
    acts[37, 2] = value
    with pytest.raises(UserError, match=r"not finite.*row 37"):
        cache_of(tmp_path / "cache", acts)


@pytest.mark.parametrize("value", BAD)
def test_training_stops_with_the_rows_named(value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = cache_of(tmp_path / "cache", torch.randn(400, D_IN))
    poison(cache, 5, value)
    said = refused(["train", str(cache), "--out", str(tmp_path / "run"), *TRAIN], capsys)
    assert "shard_00000" in said and "finite" in said, said
    with pytest.raises(UserError):
        load_sae(tmp_path / "run")


@pytest.mark.parametrize("command", ["evaluate", "index"])
@pytest.mark.parametrize("value", BAD)
def test_results_are_not_made_of_them(
    command: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(tmp_path / "cache", torch.randn(400, D_IN))
    assert call(["train", str(cache), "--out", str(tmp_path / "run"), *TRAIN]) == 0
    for row in (5, 399):  # of the training part and of the held-out part
        poison(cache, row, value)
    more = ["--lm-tokens", "0"] if command == "evaluate" else []
    said = refused([command, str(tmp_path / "run"), "--cache", str(cache), *more], capsys)
    assert "shard_00000" in said and "finite" in said, said
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert not (tmp_path / "run" / "features").exists()


@pytest.mark.parametrize("variant", ["topk", "abs_topk", "batch_topk", "jump_relu", "matching_pursuit", "gated"])
def test_zeros_pass_through_everything(variant: str, tmp_path: Path) -> None:
    """A third of the rows is zero, and so is one dimension throughout."""
    acts = torch.randn(600, D_IN)
    acts[::3] = 0
    acts[:, 3] = 0
    cache = cache_of(tmp_path / "cache", acts)
    size = [] if variant in {"jump_relu", "gated"} else ["--n-steps" if variant == "matching_pursuit" else "--k", "3"]
    command = ["train", str(cache), "--out", str(tmp_path / "run"), "--variant", variant, "--d-sae", "24", *size]
    assert call([*command, "--batch-size", "100", "--epochs", "2", "--device", "cpu"]) == 0
    assert call(["evaluate", str(tmp_path / "run"), "--cache", str(cache), "--lm-tokens", "0"]) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    assert all(math.isfinite(entry["value"]) for entry in metrics.values() if isinstance(entry["value"], float))
    assert call(["index", str(tmp_path / "run"), "--cache", str(cache)]) == 0
    table = FeatureIndex(tmp_path / "run").table()
    assert table[["density", "max", "mean"]].notna().all().all()


def test_nothing_but_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = cache_of(tmp_path / "cache", torch.zeros(400, D_IN))
    said = refused(["train", str(cache), "--out", str(tmp_path / "run"), *TRAIN], capsys)
    assert "are the same (variance zero)" in said, said


def test_encoding_zeros_gives_finite_codes() -> None:
    for variant in ("topk", "abs_topk", "matching_pursuit", "jump_relu", "relu", "gated", "batch_topk"):
        size = {"matching_pursuit": {"n_steps": 3}, "jump_relu": {}, "relu": {}, "gated": {}}.get(variant, {"k": 3})
        sae = build(variant, D_IN, 24, **size).eval()
        code = sae.encode(torch.zeros(5, D_IN))
        assert code.values.isfinite().all()
        assert sae.decode(code).isfinite().all()

"""Training on a rolling cache: bit for bit the run on the whole cache with the same rows, also after kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.evaluation.controls.trained import recipe
from saelab.runs import Run
from saelab.runs.card import model_card
from saelab.sae import build
from saelab.sae.weights import load_sae
from saelab.sweep import make_grid, run_sweep
from saelab.training import TrainConfig, fit_steps, train
from tests.harvesting.rolling import TEXT, FullRun, kill_at, llama, rolling, whole
from tests.planted import contents

CONFIG = TrainConfig(epochs=1, batch_size=48, lr="auto", dead_after=200)
D_SAE = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def full(model: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return whole(model, tmp_path_factory.mktemp("full") / "cache", gradients=True)


def fresh(variant: str = "batch_topk") -> Any:
    torch.manual_seed(0)
    return build(variant, 64, D_SAE, k=4)


def trained(folder: Path) -> dict[str, bytes]:
    """The files of a run that hold numbers."""
    return {name: data for name, data in contents(folder).items() if name.endswith((".safetensors", ".jsonl"))}


@pytest.mark.parametrize("variant", ["batch_topk", "gradient_topk"])
def test_the_run_is_that_of_the_whole_cache(model: Any, full: ActivationCache, tmp_path: Path, variant: str) -> None:
    with rolling(model, tmp_path / "cache", gradients=True, cache_gb=0.0012) as cache:
        last = train(fresh(variant), cache, CONFIG, tmp_path / "rolled")
        reference = FullRun(full, cache.kept, cache.record, 4000)
    assert last is not None
    assert last.step == 4000 // 48
    train(fresh(variant), reference, CONFIG, tmp_path / "whole")
    assert trained(tmp_path / "rolled") == trained(tmp_path / "whole")
    evaluation = evaluate(
        load_sae(tmp_path / "rolled"), ActivationCache(tmp_path / "cache"), None, EvaluateConfig(lm_tokens=0)
    )
    assert 0 < evaluation.metrics["fvu"].value < 2


@pytest.mark.parametrize("write", [33])
def test_a_killed_run_resumes_to_the_same_bytes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    with rolling(model, tmp_path / "cache") as cache:
        train(fresh(), cache, CONFIG, tmp_path / "once")
    kill_at(monkeypatch, write)
    often: dict[str, Any] = {"checkpoint_steps": 10}
    with pytest.raises(KeyboardInterrupt), rolling(model, tmp_path / "again") as cache:
        for _ in fit_steps(fresh(), cache, CONFIG, tmp_path / "run", **often):
            pass
    monkeypatch.undo()
    with rolling(model, tmp_path / "again", resume=True) as cache:
        train(fresh(), cache, CONFIG, tmp_path / "run", resume=True, **often)
    assert trained(tmp_path / "run") == trained(tmp_path / "once")


def test_a_sweep_reads_one_stream(model: Any, tmp_path: Path) -> None:
    """Stopped half-way and continued, each SAE is the one that was trained alone."""
    grid = make_grid(
        {
            "train": {"batch_size": 48, "dead_after": 200},
            "grid": [{"variant": ["batch_topk", "topk"], "d_sae": D_SAE, "k": 4}],
        },
        assumed={"epochs": 1},
    )
    with rolling(model, tmp_path / "alone") as cache:
        train(fresh(), cache, CONFIG, tmp_path / "run")
    passes = 0

    def count(what: str, done: int, total: int) -> None:
        nonlocal passes
        passes += what == "harvest"

    with rolling(model, tmp_path / "cache") as cache:
        sweep = run_sweep(grid, cache, tmp_path / "sweep")
        for members in sweep:
            if members[0].step == 30:
                break
        sweep.close()
    with rolling(model, tmp_path / "cache", resume=True, progress=count) as cache:
        members = list(run_sweep(grid, cache, tmp_path / "sweep", resume=True))[-1]
        segments = cache.record.segments
    assert [member.status for member in members] == ["finished", "finished"]
    assert trained(tmp_path / "sweep" / "batch_topk") == trained(tmp_path / "run")
    assert passes < sum(segment.passes for segment in segments)  # those on disk were not harvested again


def test_files_say_that_the_run_was_rolled(model: Any, tmp_path: Path) -> None:
    with rolling(model, tmp_path / "cache") as cache:
        train(fresh(), cache, CONFIG, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    rolled = run.metadata["rolled"]
    assert (rolled["text"], rolled["tokens"], rolled["window_tokens"]) == (TEXT.name, 4000, 640)
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["steps"] == 83
    assert "4,000 activations, harvested meanwhile" in model_card(run)
    with pytest.raises(UserError, match="a control cannot be trained"):
        recipe(tmp_path / "run")


def test_what_a_stream_cannot_do_is_refused(model: Any, tmp_path: Path) -> None:
    with rolling(model, tmp_path / "cache") as cache:
        with pytest.raises(UserError, match="epochs=2: a rolling cache is read once"):
            train(fresh(), cache, TrainConfig(epochs=2, batch_size=48))
        with pytest.raises(UserError, match="batch_size=4096 exceeds the 4000 training rows"):
            train(fresh(), cache, TrainConfig(epochs=1, batch_size=4096))
        with pytest.raises(UserError, match="needs gradients"):
            train(fresh("gradient_topk"), cache, CONFIG)

"""Where metrics go besides metrics.jsonl: both services are optional, and a resumed run continues their records."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from saelab.errors import UserError
from saelab.training.log import JsonLines, TensorBoard, Wandb

ROW = {"step": 3, "fvu": 0.5, "l0": 8.0}


def test_json_lines_drop_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "fv')
    log = JsonLines(tmp_path, step=2)
    log.write({"step": 3, "again": True})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    JsonLines(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.fixture
def wandb_calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """What a stub of wandb was told."""
    calls: list = []

    class Run:
        def log(self, values: dict, step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    def init(**options) -> Run:
        calls.append(options)
        return Run()

    stub = types.ModuleType("wandb")
    stub.init = init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return calls


def test_wandb_continues_the_run_of_the_folder(tmp_path: Path, wandb_calls: list) -> None:
    log = Wandb(tmp_path / "run", "project", {"lr": 1.0})
    log.write(ROW)
    log.close()
    first, *rest = wandb_calls
    assert first["name"] == "run" and first["resume"] == "allow" and first["config"] == {"lr": 1.0}
    assert rest == [(3, {"train/fvu": 0.5, "train/l0": 8.0}), "finish"]
    Wandb(tmp_path / "run", "project", {})
    (tmp_path / "run").rename(tmp_path / "moved")
    Wandb(tmp_path / "moved", "project", {})
    assert {call["id"] for call in wandb_calls if isinstance(call, dict)} == {first["id"]}


def test_wandb_runs_of_folders_with_one_name_are_two(tmp_path: Path, wandb_calls: list) -> None:
    for experiment in ("exp1", "exp2"):
        Wandb(tmp_path / experiment / "topk", "project", {})
    assert wandb_calls[0]["id"] != wandb_calls[1]["id"]


def test_wandb_runs_of_the_first_release_go_on(tmp_path: Path, wandb_calls: list) -> None:
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    Wandb(tmp_path / "run", "project", {})
    assert wandb_calls[0]["id"] == "project-run"


def test_tensorboard_gets_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *values) -> None:
            calls.append(values)

        def close(self) -> None:
            calls.append("close")

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    log = TensorBoard(tmp_path, step=2)
    log.write(ROW)
    log.close()
    assert calls == [(str(tmp_path / "tensorboard"), 3), ("train/fvu", 0.5, 3), ("train/l0", 8.0, 3), "close"]


@pytest.mark.parametrize("module", ["wandb", "torch.utils.tensorboard"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs `pip install saelab\[(wandb|tensorboard)\]`"):
        Wandb(tmp_path, "p", {}) if module == "wandb" else TensorBoard(tmp_path)

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


def test_wandb_continues_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    log = Wandb(tmp_path / "run", "project", {"lr": 1.0})
    log.write(ROW)
    log.close()
    assert calls[0]["id"] == "project-run" and calls[0]["resume"] == "allow" and calls[0]["config"] == {"lr": 1.0}
    assert calls[1:] == [(3, {"train/fvu": 0.5, "train/l0": 8.0}), "finish"]


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

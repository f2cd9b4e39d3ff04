"""Two processes that write one cache, run or sweep: one of them does, the other is told so, and the result is whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache
from saelab.errors import UserError
from saelab.files import lock
from saelab.sae.weights import load_sae
from tests.hardening.place import call, refused

ROWS = 400
# Holds the folder as a writer does between two shards, until its standard input is closed.
HOLD = """
import sys, torch
from saelab.data.cache import CacheWriter, Manifest
from saelab.data.cache.storage import Folder
writer = CacheWriter(Folder(sys.argv[1]), Manifest(d_in=4))
rows = torch.full((10, 4), 7.0)
writer.write_shard(rows, torch.arange(10), torch.arange(10), torch.arange(10))
print("writing", flush=True)
sys.stdin.read()
writer.finish()
"""


@pytest.fixture
def other(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "cache")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_second_is_refused_and_the_first_finishes(other: subprocess.Popen, tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(UserError, match="another process is writing"):
            ActivationCache.from_tensors(tmp_path / "cache", torch.randn(ROWS, 4), overwrite=overwrite)
    other.stdin.close()
    assert other.wait(60) == 0
    cache = ActivationCache(tmp_path / "cache", verify=True)
    assert torch.equal(cache.read(range(10)).acts, torch.full((10, 4), 7.0))
    # Now the folder is free, and may be replaced.
    assert ActivationCache.from_tensors(tmp_path / "cache", torch.randn(ROWS, 4), overwrite=True).n_rows == ROWS


def test_a_killed_writer_holds_nothing(other: subprocess.Popen, tmp_path: Path) -> None:
    other.kill()
    other.wait()
    made = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(ROWS, 4), overwrite=True)
    made.verify()
    assert made.n_rows == ROWS


def test_the_same_process_may_try_again(tmp_path: Path) -> None:
    bad = torch.randn(50, 4)
    bad[20] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        ActivationCache.from_tensors(tmp_path / "cache", bad)
    assert ActivationCache.from_tensors(tmp_path / "cache", torch.randn(50, 4), overwrite=True).n_rows == 50


GRID = '[train]\nbatch_size = 100\nepochs = {epochs}\n[[grid]]\nvariant = "topk"\nd_sae = 24\nk = [2, 3]\n'


def line(command: str, folder: Path, epochs: int) -> list[str]:
    """A training or a sweep into ``folder/out``."""
    if command == "train":
        options = ["--d-sae", "24", "--k", "3", "--batch-size", "100", "--epochs", str(epochs)]
    else:
        (folder / f"{epochs}.toml").write_text(GRID.format(epochs=epochs))
        options = [str(folder / f"{epochs}.toml")]
    return [command, str(folder / "cache"), *options, "--out", str(folder / "out"), "--device", "cpu"]


@pytest.fixture(params=["train", "sweep"])
def busy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """A command that is in the middle of writing ``tmp_path/out``, halted there."""
    ActivationCache.from_tensors(tmp_path / "cache", torch.randn(600, 8))
    args = [sys.executable, "-m", "saelab", *line(request.param, tmp_path, 1_000_000)]
    process = subprocess.Popen(
        args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    )
    deadline = time.monotonic() + 120
    while not any(log.stat().st_size for log in (tmp_path / "out").rglob("metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    yield request.param, process
    process.kill()
    process.wait()


def test_a_second_training_is_refused_and_a_killed_one_holds_nothing(
    busy: tuple[str, subprocess.Popen], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (command, process), out = busy, tmp_path / "out"

    def files() -> dict[Path, int]:
        own = (path for path in sorted(out.rglob("*")) if ".workers" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in own}

    before = files()
    # A sweep may be resumed while others are at work on it.
    for option in ([], *([["--resume"]] if command == "train" else []), ["--overwrite"]):
        said = refused([*line(command, tmp_path, 1), *option], capsys)
        assert f"another process is writing {out}; wait for it" in said and "\n" not in said
    assert files() == before
    if command == "sweep":  # its SAEs are runs, and may not be trained into either
        run = next(path.parent for path in out.rglob("metrics.jsonl"))
        into = line("train", tmp_path, 1)
        into[into.index(str(out))] = str(run)
        assert f"another process is writing {run}" in refused([*into, "--resume"], capsys)
    process.kill()
    process.wait()
    assert call([*line(command, tmp_path, 1), "--overwrite"]) == 0
    done = {path.parent for path in out.rglob("cfg.json")}
    assert len(done) == (1 if command == "train" else 2)
    assert all(load_sae(folder).d_sae == 24 for folder in done)


def test_one_process_may_hold_a_folder_twice(tmp_path: Path) -> None:
    """As a command does around the training it starts: the outer block keeps what the inner one leaves."""
    code = "import sys; from pathlib import Path; from saelab.files import lock\nwith lock(Path(sys.argv[1])): pass"
    other = [sys.executable, "-c", code, str(tmp_path / "out")]
    with lock(tmp_path / "out"):
        with lock(tmp_path / "out"):
            pass
        ran = subprocess.run(other, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert "another process is writing" in ran.stderr
    assert subprocess.run(other, check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize("code", [errno.EBADF, errno.EOPNOTSUPP, errno.EIO])
def test_file_systems_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Network file systems that cannot lock a folder are written without a lock and with a warning."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            ActivationCache.from_tensors(tmp_path / "cache", torch.randn(20, 4))
    else:
        assert ActivationCache.from_tensors(tmp_path / "cache", torch.randn(20, 4)).n_rows == 20
        (said,) = caplog.messages
        assert said.startswith(f"{tmp_path / 'cache'} cannot be locked ({os.strerror(code)})")

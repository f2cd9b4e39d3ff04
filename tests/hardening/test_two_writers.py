"""Two processes that write one cache: one of them does, the other is told so, and the cache is whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache
from saelab.errors import UserError

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

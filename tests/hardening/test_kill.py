"""kill -9 at random moments: what is on disk is always usable, and going on gives the bytes of a quiet run."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from tests import tiny_lm
from tests.planted import GRID, activations
from tests.processes import PRELOADED

HOOK = "blocks.2.hook_resid_post"
PATIENCE = 120.0  # seconds for one command on a busy machine


def quietly(args: list[str]) -> None:
    """A command in a process of its own, from a parent that has everything imported."""
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        main(args)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Forks of one process that has imported the package: each starts at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # started processes would run it again
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)  # one first process serves all tests
        yield context


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a text, a cache, a grid and a trained SAE."""
    root = tmp_path_factory.mktemp("kill")
    tiny_lm.save_llama(root / "llama")
    (root / "text.txt").write_text(tiny_lm.sentences(1500))
    (root / "grid.toml").write_text(GRID)
    tokens = torch.randint(0, 50, (960,), generator=torch.Generator().manual_seed(1))
    ActivationCache.from_tensors(root / "cache", activations(960, 8), tokens, context_length=20, held_out=0.1)
    main([*train(root, root / "run"), "--epochs", "2"])
    return root


def harvest(root: Path, out: Path) -> list[str]:
    text = ["--model", str(root / "llama"), "--text", str(root / "text.txt"), "--hook", HOOK, "--gradients"]
    sizes = ["--tokens", "600", "--context-length", "16", "--pass-tokens", "32", "--shard-bytes", "1024"]
    return ["harvest", "--out", str(out), "--resume", *text, *sizes]


def train(root: Path, out: Path) -> list[str]:
    config = ["--d-sae", "20", "--k", "3", "--batch-size", "32", "--epochs", "6", "--ema", "0.9", "--lr", "0.01"]
    return ["train", str(root / "cache"), "--out", str(out), "--resume", "--checkpoint-steps", "3", *config]


def sweep(root: Path, out: Path) -> list[str]:
    options = ["--out", str(out), "--resume", "--checkpoint-steps", "5"]
    return ["sweep", str(root / "cache"), str(root / "grid.toml"), *options]


def index(root: Path, out: Path) -> list[str]:
    if not out.exists():
        out.mkdir()
        for path in (root / "run").iterdir():
            (out / path.name).write_bytes(path.read_bytes())
    return ["index", str(out), "--cache", str(root / "cache"), "--model", "none", "--overwrite"]


def contents(folder: Path) -> dict[str, Any]:
    """Every file by name, but for what tells the time a run took."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name in ("evaluation.json", "report.html"):
            found[name] = None
        else:
            # The time stands in the metadata, and in a column; as text, because NaN differs from itself.
            table = pq.read_table(path) if path.suffix == ".parquet" else None
            if table is not None and "cpu_seconds" in table.column_names:
                table = table.drop_columns(["cpu_seconds"])
            found[name] = path.read_bytes() if table is None else repr(table.to_pylist())
    return found


def finish(processes: Any, args: list[str]) -> float:
    """Seconds that a command takes."""
    process = processes.Process(target=quietly, args=(args,))
    started = time.monotonic()
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, args
    return time.monotonic() - started


def kill_often(processes: Any, root: Path, folder: Path, command: Callable[[Path, Path], list[str]], kills: int) -> int:
    """Cut a command short ``kills`` times at random, letting it end now and then; returns how often it had ended.

    Each end has the files of a command that nobody cut. One that ended before its turn is begun anew, so that every
    kill hits a command at work.
    """
    whole = folder / "whole"
    # The first call also loads what later ones find loaded.
    seconds = min(finish(processes, command(root, out)) for out in (folder / "first", whole))
    expected, seed, done = contents(whole), random.randrange(2**32), 0
    dice, cut, since = random.Random(seed), 0, 0
    for _ in range(10 * kills):
        process = processes.Process(target=quietly, args=(command(root, folder / "cut"),))
        process.start()
        process.join(dice.uniform(0, seconds))
        if process.is_alive():
            process.kill()
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}, dice {seed}"
        ended = process.exitcode == 0
        cut, since = cut + (not ended), since + 1
        if ended or since == 4 or cut == kills:
            if not ended:
                finish(processes, command(root, folder / "cut"))
            assert contents(folder / "cut") == expected, f"dice {seed}"
            (folder / "cut").rename(folder / f"done-{done}")
            done, since = done + 1, 0
        if cut == kills:
            return done
    raise AssertionError(f"{cut} of {kills} kills hit a command at work, dice {seed}")


def test_killed_a_few_times_and_resumed(processes: Any, material: Path, tmp_path: Path) -> None:
    # Every run has a killed training in training/test_resume.py, a sweep in sweep/test_sweep.py, an index in features.
    assert kill_often(processes, material, tmp_path, harvest, 4) > 0


@pytest.mark.minutes
@pytest.mark.parametrize("command", [harvest, train, sweep, index])
def test_killed_twenty_times_and_resumed(processes: Any, material: Path, tmp_path: Path, command: Any) -> None:
    assert kill_often(processes, material, tmp_path, command, 20) >= 5

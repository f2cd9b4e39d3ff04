"""A cache, a trained run and its index, made through the command line, and ways to run commands on them.

``make`` builds a ``Place``; ``train``, ``evaluate`` and ``index`` are the commands it ran, as argument lists, for tests
that run them again under hard conditions. ``call`` gives a command's exit code, ``refused`` its one line of error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from saelab import ActivationCache, cli

D_IN, D_SAE, ROWS = 8, 24, 600
TRAIN = ["--d-sae", str(D_SAE), "--k", "3", "--batch-size", "100", "--epochs", "1", "--device", "cpu"]


class Place(NamedTuple):
    folder: Path
    cache: Path
    run: Path


def make(folder: Path) -> Place:
    """Cache, trained SAE, evaluation and index, all through the command line."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(ROWS, D_IN, generator=generator)
    tokens = torch.randint(0, 40, (ROWS,), generator=generator)
    words = [f" w{i}" for i in range(40)]
    ActivationCache.from_tensors(
        folder / "cache",
        acts,
        tokens,
        context_length=20,
        shard_rows=300,
        vocabulary=words,
        hook_name="blocks.1.hook_mlp_out",
    )
    place = Place(folder, folder / "cache", folder / "run")
    for command in (train(place, place.run), evaluate(place), index(place)):
        cli.main(command)
    return place


def train(place: Place, out: Path) -> list[str]:
    return ["train", str(place.cache), "--out", str(out), *TRAIN]


def evaluate(place: Place) -> list[str]:
    return ["evaluate", str(place.run), "--cache", str(place.cache), "--lm-tokens", "0", "--batch-size", "256"]


def index(place: Place, *more: str) -> list[str]:
    return ["index", str(place.run), "--cache", str(place.cache), "--top", "2", *more]


def call(command: Sequence[str]) -> int:
    """The exit code of a command; anything but an orderly end is an error of the test."""
    try:
        cli.main(command)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def refused(command: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with code 2: one line on stderr after anything about progress."""
    capsys.readouterr()
    assert call(command) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("error:") == 1
    return error[error.index("error:") :].strip()

"""Benchmarks as commands: wrong paths and options end them with one line before anything is measured."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from saelab.bench.__main__ import benchmarks
from saelab.bench.command import Shape, shape_of
from saelab.errors import UserError

CACHE = str(Path(__file__).parents[1] / "data/v0.1.0/caches/post")
RUN = str(Path(__file__).parents[2] / "checkpoints/topk")
# Per benchmark: command lines, each with a part of what it has to say.
WRONG = {
    "attribution": {"/nowhere": "/nowhere does not exist", "--tokens 0": "--tokens 0"},
    "cache": {"--rows -5": "--rows -5", "--rounds 0": "--rounds 0", "--out /nowhere/a.json": "folder /nowhere"},
    "concepts": {"--run /nowhere": "/nowhere", f"--run {RUN} --concepts foo": "'foo'", "--budget-kl nan": "nan"},
    "counting": {"": "TRITON_INTERPRET=1"},
    "dead": {
        "/nowhere": "/nowhere does not exist",
        f"{CACHE} --variants foo": "'foo'",
        f"{CACHE} --variants": "--variants names nothing",
        f"{CACHE} --seeds 0": "--seeds 0",
        f"{CACHE} --out .": "is a folder",
    },
    "distributed": {"--k 5000": "--k 5000", "--processes 5": "--d-sae 4608"},
    "encoder_start": {
        "/nowhere": "/nowhere does not exist",
        f"{CACHE} --variants foo": "'foo'",
        f"{CACHE} --variants matching_pursuit": "has no encoder of its own",
        f"{CACHE} --starts 0": "--starts 0",
        f"{CACHE} --seeds 0": "--seeds 0",
    },
    "evaluation": {
        f"/nowhere --cache {CACHE}": "/nowhere does not exist",
        f"{RUN} --cache {CACHE}": "width d_in=576",
        f"{CACHE} --cache {RUN}": "post",
    },
    "features": {"--variant foo": "'foo'", "--pages 0": "--pages 0"},
    "gpu": {"--device tpu": "'tpu'", "--device cpu --out /nowhere/a.json": "folder /nowhere"},
    "harvest": {"--layer -1": "--layer -1", "--tokens 0": "--tokens 0"},
    "kernels": {"--shape axb": "'axb'", "--peers-python /nowhere": "/nowhere", "--pursuit 1x2": "'1x2'"},
    "l0": {"--variants foo": "'foo'", "--threads 0": "--threads 0", "--cache /nowhere": "/nowhere"},
    "labels": {f"/nowhere --cache {CACHE}": "/nowhere", f"--cache {CACHE}": "names nothing"},
    "learning_rate": {"--out .": "is a folder", "--out a.jsonl": "--caches", "--out a.jsonl --caches .": "manifest"},
    "overlap": {"--features 200": "--features 200", "--k 0": "--k 0"},
    "precision": {f"{RUN} --cache {CACHE}": "width d_in=576", f"{RUN} --cache {CACHE} --device tpu": "'tpu'"},
    "rolling": {"--cache-gb 0": "--cache-gb 0.0", "--device tpu": "'tpu'"},
    "search": {"": "names nothing", "/nowhere": "/nowhere", f"{RUN} --concepts foo": "'foo'"},
    "steering": {"--rounds 0": "--rounds 0", "--layer -1": "--layer -1"},
    "step": {"--shape 1x2": "'1x2'", "--shape 2x2x4x9": "9 of 4"},
    "sweep": {"--threads -1": "--threads -1", "--d-sae 5 --d-in 4 --batch-size 8 --rounds 1": "k=16"},
    "transcoder": {"--shape 1x2": "'1x2'", "--variant foo": "'foo'"},
}
LINES = [(name, line, said) for name, lines in WRONG.items() for line, said in lines.items()]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("name", "line", "said"), LINES, ids=[f"{name} {line}" for name, line, _ in LINES])
def test_what_is_wrong_is_said_in_one_line(
    name: str,
    line: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", [name, *line.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"saelab.bench.{name}", run_name="__main__", alter_sys=True)
    assert stop.value.code == 2
    spoken = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
    assert len(spoken) == 1 and said in spoken[0]
    assert list(tmp_path.iterdir()) == []


def test_every_benchmark_is_tried() -> None:
    assert {name.removeprefix("saelab.bench.") for name in benchmarks()} == WRONG.keys()


def test_a_kernel_backend_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from saelab.bench import command, step

    monkeypatch.setenv("SAELAB_KERNELS", "foo")
    with pytest.raises(SystemExit):
        command.run(lambda: step.main([]))
    assert "'foo' was asked for but there is none of that name" in " ".join(capsys.readouterr().err.split())


def test_a_shape_is_four_numbers() -> None:
    assert shape_of("4096x576x16384x32") == Shape(4096, 576, 16384, 32)
    for text in ("", "1x2x3", "1x2x3x0", "1x-2x3x1", "1x2x3x1x1", "ax2x3x1"):
        with pytest.raises(UserError, match="is no shape"):
            shape_of(text)

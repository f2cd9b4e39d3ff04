"""Random command lines: they work or say in a few lines what is wrong; never a traceback.

What would take long or leave this process (the training loop, a language model, the server) is cut off just where it
would begin; everything before it, parsing and checks and opening what is named, runs.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saelab import cli
from saelab.errors import UserError
from tests.hardening.place import Place, make

FEW, MANY = 250, 10_000


class Began(BaseException):
    """The command got through all its checks."""


def began(*args: object, **options: object) -> None:
    raise Began


def no_model(*args: object, **options: object) -> None:
    raise UserError("no language model in this test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("lines")
    (folder / "file.txt").write_text("no such thing\n")
    (folder / "empty").mkdir()
    (folder / "grid.toml").write_text('[train]\nepochs = 1\n[[grid]]\nvariant = "topk"\nd_sae = 24\nk = 3\n')
    return make(folder)


@pytest.fixture
def cut(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No long work, no models, no server; relative paths are inside the place."""
    for name in ("train.drive", "sweep.train", "evaluate.evaluate", "index.build_index", "explain.interpret_all"):
        monkeypatch.setattr(f"saelab.cli.commands.{name}", began)
    for name in ("reproduce.reproduce", "serve.open_model", "steer.open_model", "convert.export", "convert.resave"):
        monkeypatch.setattr(f"saelab.cli.commands.{name}", began)
    for name in ("load_model", "load_hf_model", "record.load_model", "record.load_hf_model"):
        monkeypatch.setattr(f"saelab.lm.{name}", no_model)
    monkeypatch.setattr("saelab.data.text.open_text", no_model)
    monkeypatch.setattr("saelab.interop.fetch.download", no_model)
    monkeypatch.setattr("saelab.cli.commands.demo.stages", lambda options: began())
    monkeypatch.setattr("os.execve", began)
    monkeypatch.chdir(place.folder)


def options_of(command: str) -> list[str]:
    """The option names that a command's help lists."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    return sorted(set(re.findall(r"--[a-z][a-z0-9-]+", shown.getvalue())))


COMMANDS = [*cli.COMMANDS, "cache info", "cache verify", "cache merge", "cache import"]
VALUES = st.one_of(
    st.sampled_from(
        ["cache", "run", "file.txt", "empty", "missing", "grid.toml", "new", ".", "", "/", "cache/manifest.json"]
    ),
    st.sampled_from(
        ["0", "1", "-1", "3", "1e3", "1e400", "nan", "inf", "-inf", "0.5", str(2**40), str(10**30), "None", "True"]
    ),
    st.sampled_from(
        ["topk", "abs_topk", "gated", "batch", "token", "saelens", "saelab", "cpu", "cuda", "org/repo", "smollm2"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8),
)
OPTIONS = {command: options_of(command) for command in COMMANDS}
# These would write outside the new folder, or replace what the next example needs.
KEEP = {"--overwrite", "--resume"}


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(COMMANDS) | st.text(max_size=6))
    line: list[str] = command.split() if command in OPTIONS else [command]
    known = [name for name in OPTIONS.get(command, ["--out", "--k"]) if name not in KEEP]
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.integers(0, 3))
        if kind and known:
            line.append(draw(st.sampled_from(known)))
        if kind != 1:
            line.append(draw(VALUES))
    return line


def orderly(line: list[str]) -> None:
    """Run a line in this process; anything but an orderly end raises."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(line)
        except SystemExit as stop:
            code = stop.code or 0
        except Began:
            return
    assert code in {0, 2}, line
    assert "Traceback" not in out.getvalue() + err.getvalue(), line


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=FEW, deadline=None, suppress_health_check=CHECKS, derandomize=True)
@given(line=lines())
def test_some_command_lines(cut: None, line: list[str]) -> None:
    orderly(line)


@pytest.mark.minutes
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=MANY, deadline=None, suppress_health_check=CHECKS)
@given(line=lines())
def test_ten_thousand_command_lines(cut: None, line: list[str]) -> None:
    orderly(line)


def test_the_lines_do_reach_the_commands(cut: None, place: Place) -> None:
    with pytest.raises(Began):
        cli.main(["train", "cache", "--out", "new", "--d-sae", "24", "--k", "3", "--batch-size", "10"])
    with pytest.raises(Began):
        cli.main(["evaluate", "run", "--cache", "cache"])
    assert len(OPTIONS["train"]) > 20
    assert not Path("new").exists() or not any(Path("new").iterdir())

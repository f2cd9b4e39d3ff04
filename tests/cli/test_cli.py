"""The command line: help, errors with a remedy, exit codes."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import saelab
from saelab import cli


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return int(stop.value.code or 0)


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    assert "COMMAND [options]" in shown


def test_overview_follows_the_order_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(cli.COMMANDS) == [
        *(
            "demo",
            "harvest",
            "cache",
            "train",
            "sweep",
            "evaluate",
            "l0",
            "index",
            "explain",
            "map",
            "find",
            "labels",
            "app",
            "attribute",
            "steer",
            "steer-eval",
            "serve",
        ),
        *("inspect", "convert", "card", "reproduce", "plan", "info"),
    ]
    cli.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines] == list(cli.COMMANDS)
    assert all(len(words) > 3 for words in lines)


@pytest.mark.parametrize("option", ["--hook", "--hook-name"])
def test_an_imported_cache_is_told_its_hook_point_as_a_harvest_is(option: str, tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", np.ones((20, 4), dtype=np.float32) * np.arange(20, dtype=np.float32)[:, None])
    command = ["cache", "import", str(tmp_path / "acts.npy"), "--out", str(tmp_path / "cache")]
    cli.main([*command, option, "blocks.1.hook_resid_post"])
    assert saelab.ActivationCache(tmp_path / "cache").hook_name == "blocks.1.hook_resid_post"


def test_unknown_command_suggests_a_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trian") == 2
    shown = capsys.readouterr().err
    assert "train" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        cli.main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert "usage: saelab" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.npy"),
            "a.npy: No such file or directory; check",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a: Is a directory; it is a folder; name a file"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused; check the connection"),
        (OSError("\nno such repository\nmore"), "no such repository; fix this"),
        (OSError(), "OSError; fix this"),
    ],
)
def test_whatever_the_system_refuses_has_a_remedy(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(args: object) -> None:
        raise error

    monkeypatch.setattr("saelab.cli.commands.info.main", refuse)
    assert run("info") == 2
    shown = capsys.readouterr().err.strip()
    assert said in shown and "\n" not in shown


# Settings that are fields of a command's options, and live where they are used.
SETTINGS = [
    *("training/config.py:TrainConfig", "evaluation/__init__.py:EvaluateConfig"),
    *("features/indexing/config.py:IndexConfig", "features/explanations/interpretation.py:InterpretConfig"),
    "evaluation/tasks/battery.py:TaskConfig",
    *(
        "harvesting/config.py:HarvestConfig",
        "reproduce/lab.py:Scale",
        "distributed/plan.py:Machine",
        "distributed/plan.py:Work",
    ),
]


def fields_of(node: ast.ClassDef) -> dict[str, bool]:
    """The fields of a class, and whether a description follows each."""
    pairs = zip(node.body, [*node.body[1:], None])
    return {
        ast.unparse(field): isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        for field, after in pairs
        # The fields of a machine stand in the help themselves.
        if isinstance(field, ast.AnnAssign) and "OmitArgPrefixes" not in ast.unparse(field)
    }


def option_classes() -> Iterator[ast.ClassDef]:
    """Every class whose fields are options of a command: those above, and in the commands those that describe any."""
    package = Path(saelab.__file__).parent
    places = [*SETTINGS, *(f"{path.relative_to(package)}:" for path in package.glob("cli/commands/*.py"))]
    for file, name in (place.split(":") for place in places):
        found = [node for node in ast.parse((package / file).read_text()).body if isinstance(node, ast.ClassDef)]
        assert not name or name in {node.name for node in found}
        yield from (n for n in found if n.name == (name or "Options") or (not name and any(fields_of(n).values())))


def test_every_option_says_what_it_is() -> None:
    for node in option_classes():
        for field, described in fields_of(node).items():
            assert described, f"{node.name}: {field} has no description"


def test_import_is_fast() -> None:
    """The package alone loads nothing heavy. Two seconds of slack for a busy machine would hide torch: list it."""
    code = "import saelab, sys; print([m for m in ('torch', 'transformers', 'numba', 'plotly') if m in sys.modules])"
    started = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
    assert time.perf_counter() - started < 5

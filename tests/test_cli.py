"""The command line: help, errors with a remedy, exit codes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from saelab import cli


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return int(stop.value.code or 0)


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


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


def test_import_is_fast() -> None:
    """The package alone loads nothing heavy. Two seconds of slack for a busy machine would hide torch: list it."""
    code = "import saelab, sys; print([m for m in ('torch', 'transformers', 'numba', 'plotly') if m in sys.modules])"
    started = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
    assert time.perf_counter() - started < 5

"""``saelab app``: what is served, where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from saelab.cli.app import Options, app_script, prepare
from saelab.errors import UserError


def test_serves_this_machine_only(tmp_path: Path) -> None:
    command, environment = prepare(Options(tmp_path, port=8999, browser=False))
    assert "--server.address=127.0.0.1" in command and "--server.port=8999" in command
    assert environment["SAELAB_APP_FOLDER"] == str(tmp_path.resolve())
    assert Path(command[4]) == app_script() and app_script().is_file()


def test_a_model_of_an_earlier_session_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_APP_MODEL", "old")
    assert "SAELAB_APP_MODEL" not in prepare(Options(tmp_path))[1]
    assert prepare(Options(tmp_path, model="none"))[1]["SAELAB_APP_MODEL"] == "none"


def test_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        prepare(Options(tmp_path / "missing"))


def test_the_app_of_a_wheel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    import saelab

    script = tmp_path / "share" / "saelab" / "app" / "streamlit_app.py"
    script.parent.mkdir(parents=True)
    script.touch()

    class Installed:
        name = "streamlit_app.py"

        def locate(self) -> Path:
            return script

    monkeypatch.setattr(saelab, "__file__", str(tmp_path / "site" / "saelab" / "__init__.py"))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [Installed()])
    assert app_script() == script
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    with pytest.raises(UserError, match="no app folder"):
        app_script()

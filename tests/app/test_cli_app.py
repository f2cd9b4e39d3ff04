"""``saelab app``: what is served, where, and what is refused."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.NewSession_pb2 import NewSession
from users import wait_for
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from saelab import shipped
from saelab.cli.commands.app import Options, default_folder, prepare
from saelab.errors import UserError
from saelab.shipped import app_script


def test_serves_this_machine_only(tmp_path: Path) -> None:
    command, environment = prepare(Options(tmp_path, port=8999, browser=False))
    assert "--server.address=127.0.0.1" in command and "--server.port=8999" in command
    assert environment["SAELAB_APP_FOLDER"] == str(tmp_path.resolve())
    assert Path(command[4]) == app_script() and app_script().is_file()


def test_a_model_of_an_earlier_session_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_APP_MODEL", "old")
    assert "SAELAB_APP_MODEL" not in prepare(Options(tmp_path))[1]
    assert prepare(Options(tmp_path, model="none"))[1]["SAELAB_APP_MODEL"] == "none"


def test_an_endpoint_is_named_with_its_model(tmp_path: Path) -> None:
    asked = Options(tmp_path, explain_endpoint="http://127.0.0.1:1/v1", explain_model="m")
    assert '"model": "m"' in prepare(asked)[1]["SAELAB_APP_EXPLAIN"]
    assert "SAELAB_APP_EXPLAIN" not in prepare(Options(tmp_path))[1]
    for wrong in ({"explain_model": "m"}, {"explain_endpoint": "file:///x", "explain_model": "m"}):
        with pytest.raises(UserError, match=r"explain-endpoint|not an http"):
            prepare(Options(tmp_path, **wrong))


def started(how: str, folder: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of the server; streamlit's own command takes its settings from a file."""
    if how == "saelab app":
        return prepare(Options(folder, port=port, model="none"))
    command = [sys.executable, "-m", "streamlit", "run", "app/streamlit_app.py", f"--server.port={port}"]
    return command, {**os.environ, "SAELAB_APP_FOLDER": str(folder), "SAELAB_APP_MODEL": "none"}


@pytest.mark.parametrize("how", ["saelab app", "streamlit run"])
def test_a_visit_shows_nothing_of_streamlits_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    # Streamlit offers to install something where it finds the settings of an editor's assistant in the home directory,
    # unless it is told that it opens no browser.
    for name in ("SSH_CONNECTION", *(name for name in os.environ if name.startswith("STREAMLIT_"))):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".cursor").mkdir()
    (tmp_path / "runs").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command, environment = started(how, tmp_path / "runs", port)
    root = Path(__file__).parents[2]
    environment |= {"HOME": str(tmp_path), "BROWSER": "true", "PYTHONPATH": str(root)}
    server = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health")
        first = greeting(port)
    finally:
        server.terminate()
        said = server.communicate(timeout=30)[0].decode()
    assert not first.initialize.recommend_skills_install and not first.config.gather_usage_stats
    assert "skills" not in said and "usage statistics" not in said, said


def greeting(port: int) -> NewSession:
    """What the server tells a browser first."""
    address = f"ws://127.0.0.1:{port}/_stcore/stream"
    with connect(address, subprotocols=[Subprotocol("streamlit")], max_size=None, open_timeout=60) as browser:
        asked = BackMsg()
        asked.rerun_script.query_string = ""
        browser.send(asked.SerializeToString())
        while True:
            said = ForwardMsg()
            said.ParseFromString(browser.recv(timeout=60))
            if said.WhichOneof("type") == "new_session":
                return said.new_session


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
def test_a_first_run_asks_for_nothing(tmp_path: Path) -> None:
    import pty

    # Streamlit asks for an e-mail address where it finds no settings of its own in the home directory.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command, environment = prepare(Options(tmp_path, port=port, model="none"))
    terminal, ours = pty.openpty()
    environment |= {"HOME": str(tmp_path), "BROWSER": "true", "PYTHONPATH": str(Path(__file__).parents[2])}
    server = subprocess.Popen(command, env=environment, stdin=ours, stdout=ours, stderr=ours, cwd=tmp_path)
    os.close(ours)
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health")  # it would wait for an answer before it serves
        os.set_blocking(terminal, False)
        with contextlib.suppress(BlockingIOError):
            said = os.read(terminal, 4096)
            assert b"email" not in said.lower(), said
    finally:
        server.kill()
        server.wait()
        os.close(terminal)


def test_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        prepare(Options(tmp_path / "missing"))
    for port in (0, -1, 65536, 99999):
        with pytest.raises(UserError, match=f"port {port} is no TCP port"):
            prepare(Options(tmp_path, port=port))


def test_refuses_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device 'meta' is not available here"):
        prepare(Options(tmp_path, device="meta"))


def test_the_shipped_saes_are_shown_until_there_is_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folder() == shipped.checkpoints()
    (tmp_path / "demo").mkdir()
    assert default_folder() == Path("demo")


def test_what_a_wheel_installed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    import saelab

    class Installed(PurePosixPath):
        def locate(self) -> Path:
            return tmp_path / Path(*self.parts[-4:])

    files = [Installed("saelab/streamlit_app.py"), Installed("../../share/saelab/app/streamlit_app.py")]
    monkeypatch.setattr(saelab, "__file__", str(tmp_path / "site" / "saelab" / "__init__.py"))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
    assert app_script() == tmp_path / "share" / "saelab" / "app" / "streamlit_app.py"
    with pytest.raises(UserError, match="no checkpoints folder"):
        shipped.checkpoints()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    with pytest.raises(UserError, match="no app folder"):
        app_script()

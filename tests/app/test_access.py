"""Who may see the app, what of the disk it may open, and what it may write."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from streamlit.testing.v1 import AppTest
from test_pages import ENTRY, VIEWS, launch
from websockets.exceptions import InvalidHandshake
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from saelab import files
from saelab.cli.commands.app import Options, addresses, prepare
from saelab.errors import UserError
from saelab.workspace import Workspace, recipes
from saelab.workspace.notes import write_note

TOKEN = "a-token-of-the-test-0123456789"
SECRET = "text-outside-the-folder"


@contextmanager
def guarded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The app as started with ``--host 0.0.0.0``, with a known token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("SAELAB_APP_TOKEN", TOKEN)
    command = [sys.executable, "-m", "saelab", "app", str(folder), "--host", "0.0.0.0", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert re.search(rf"http://\S+:{port}/\?token={TOKEN}", said), said
        for _ in range(600):
            try:
                ask(port, "/")
            except urllib.error.HTTPError as refused:
                refused.close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.communicate(timeout=20)


class Stay(urllib.request.HTTPRedirectHandler):
    """Does not follow redirections."""

    def redirect_request(self, *args: object) -> None:
        return None


def ask(port: int, path: str, cookie: str = "") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Cookie": cookie} if cookie else {})
    with urllib.request.build_opener(Stay()).open(request, timeout=10) as answer:
        return answer.read().decode()


class Refusal(NamedTuple):
    """An answer that is not the page that was asked for."""

    status: int
    headers: Message
    text: str


def refusal(port: int, path: str, cookie: str = "") -> Refusal:
    """As :func:`ask`, where another answer than the page is expected."""
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(port, path, cookie)
    with error.value as answer:  # it holds the connection
        return Refusal(answer.code, answer.headers, answer.read().decode())


def test_other_machines_need_the_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(folder, monkeypatch) as port:
        wrong = (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "%00", "\u00e9" * 30)
        for path in ("/", "/latent", "/_stcore/health", "/_stcore/host-config", "/static/index.html", "/nonexist"):
            for token in wrong:
                query = "" if token is None else f"?token={urllib.parse.quote(token)}"
                refused = refusal(port, path + query, "" if token is None else "saelab_token=nothing")
                assert refused.status == 403 and "needs the token" in refused.text
                assert folder.name not in refused.text and "runs" not in refused.text
                assert "set-cookie" not in refused.headers
        stream = f"ws://127.0.0.1:{port}/_stcore/stream"
        for headers in ({}, {"Cookie": "saelab_token=wrong"}):
            with pytest.raises(InvalidHandshake):
                connect(stream, subprotocols=[Subprotocol("streamlit")], additional_headers=headers, legacy=True)
        welcome = refusal(port, f"/latent?run=runs%2Ftopk&token={TOKEN}&latent=3")
        assert welcome.status == 303 and welcome.headers["location"] == "/latent?run=runs%2Ftopk&latent=3"
        cookie = welcome.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite" in cookie
        welcome = refusal(port, f"//elsewhere.org/?token={TOKEN}")
        assert welcome.headers["location"].startswith("/elsewhere.org")
        assert "<html" in ask(port, "/latent", cookie.split(";")[0])
        known = {"Cookie": f"other=1; {cookie.split(';')[0]}"}
        with connect(stream, subprotocols=[Subprotocol("streamlit")], additional_headers=known):
            pass


def test_a_distant_machine_is_told_how_to_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.delenv("SAELAB_APP_TOKEN", raising=False)
    command, environment = prepare(Options(tmp_path))
    assert "SAELAB_APP_TOKEN" not in environment and "--server.headless=false" in command
    assert addresses(Options(tmp_path), None) == [f"saelab app on {tmp_path}: http://127.0.0.1:8501"]
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50112 10.0.0.5 22")
    assert "--server.headless=true" in prepare(Options(tmp_path))[0], "there is nobody in front of that machine"
    said = addresses(Options(tmp_path, port=8600), None)[1]
    assert re.search(r"ssh -L 8600:127\.0\.0\.1:8600 \S+@10\.0\.0\.5, then open http://127\.0\.0\.1:8600", said)
    for host in ("0.0.0.0", "10.0.0.5", "::"):
        command, environment = prepare(Options(tmp_path, host=host))
        token = environment["SAELAB_APP_TOKEN"]
        assert len(token) >= 24 and not any(token in part for part in command), "every user can read a command line"
        assert Path(command[4]).name == "guarded_app.py"
        assert f"/?token={token}" in addresses(Options(tmp_path, host=host), token)[0]
        assert token != prepare(Options(tmp_path, host=host))[1]["SAELAB_APP_TOKEN"]
    with pytest.raises(UserError, match="no IP address"):
        prepare(Options(tmp_path, host="example.org"))
    monkeypatch.setenv("SAELAB_APP_TOKEN", "short")
    with pytest.raises(UserError, match="16 or more"):
        prepare(Options(tmp_path, host="0.0.0.0"))
    assert "SAELAB_APP_TOKEN" not in prepare(Options(tmp_path))[1]


@pytest.mark.parametrize(
    "name", ["evaluation.json", "notes.json", "explanations.json", "features", "features/examples.parquet"]
)
def test_a_run_with_a_file_from_elsewhere_is_not_opened(folder: Path, tmp_path: Path, name: str) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for root in (inside, outside):
        shutil.copytree(folder / "runs" / "topk", root / "run")
    for note in ("notes.json", "evaluation.json", "explanations.json"):
        (outside / "run" / note).write_text("{}")
    target = inside / "run" / name
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    assert "run" in Workspace.scan(inside).runs
    target.symlink_to(outside / "run" / name)
    assert not Workspace.scan(inside).runs
    assert "run" in Workspace.scan(outside).runs


def test_no_address_leads_out_of_the_folder(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    shutil.copytree(folder / "runs" / "topk", inside / "run")
    shutil.copytree(folder / "runs" / "topk", outside / "secret")
    (outside / "secret" / "notes.json").write_text(json.dumps({"0": {"label": SECRET, "note": SECRET}}))
    (inside / "link").symlink_to(outside, target_is_directory=True)
    (inside / "recipes" / "taken").mkdir(parents=True)
    (inside / "recipes" / "taken" / "recipe.json").symlink_to(outside / "secret" / "notes.json")
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(inside))
    for run in ("../outside/secret", str(outside / "secret"), "link/secret", "run/../../outside/secret"):
        app = AppTest.from_file(ENTRY, default_timeout=60)
        app.query_params["run"], app.query_params["latent"] = run, "0"
        # The address is read before any page is drawn.
        for view in VIEWS if run == "link/secret" else ["latent.py"]:
            app.switch_page(f"views/{view}").run()
            assert not app.exception and SECRET not in str([*app.main, *app.sidebar]), (view, run)
    assert recipes.saved_recipes(inside) == []


def test_read_only_writes_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs" / "topk", tmp_path / "run")
    assert prepare(Options(tmp_path, read_only=True))[1]["SAELAB_APP_READ_ONLY"] == "1"
    monkeypatch.setenv("SAELAB_APP_READ_ONLY", "1")
    monkeypatch.setattr(files, "_protected", set())
    app = launch(monkeypatch, tmp_path, model=str(folder / "model"))
    for view in VIEWS:
        app.switch_page(f"views/{view}").run()
        assert not app.exception and not app.error, (view, app.error)
        assert not [field for field in app.text_input if field.label in ("My label", "Save as a recipe")], view
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="read-only"):
        write_note(tmp_path / "run", 1, "label", "note")
    with pytest.raises(UserError, match="read-only"), files.new_folder(tmp_path / "recipes" / "x"):
        pass
    (tmp_path / "way").symlink_to(tmp_path / "run", target_is_directory=True)
    with pytest.raises(UserError, match="read-only"):
        files.write_json(tmp_path / "way" / "new.json", {})
    (tmp_path / "way").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    files.write_json(tmp_path.parent / f"{tmp_path.name}-beside.json", {})

"""Nothing leaves this machine unless a hub id is asked for."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from saelab import load, load_model
from saelab.errors import UserError
from tests.hardening.place import Place, call, evaluate, index, make, train
from tests.tiny_lm import save_llama, sentences


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Addresses that somebody tried to look up or to reach; nobody gets through."""
    tried: list[str] = []

    def refuse(*args: object, **options: object) -> None:
        tried.append(str(args))
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    yield tried


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make(tmp_path_factory.mktemp("offline"))


def test_the_block_blocks(asked: list[str]) -> None:
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 9))
    assert asked


def test_commands_on_local_files(place: Place, asked: list[str], tmp_path: Path) -> None:
    for command in (
        ["info"],
        ["cache", "info", str(place.cache)],
        ["inspect", str(place.run)],
        train(place, tmp_path / "run"),
        evaluate(place),
        index(place, "--overwrite"),
        ["convert", str(place.run), str(tmp_path / "out"), "--to", "sparsify"],
        ["convert", str(place.run), str(tmp_path / "dash"), "--to", "saedashboard"],
    ):
        assert call(command) == 0, command
    assert asked == []


def test_a_local_language_model(asked: list[str], tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(sentences(400))
    load_model(folder, device="cpu")
    command = [
        "harvest",
        "--model",
        str(folder),
        "--text",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "cache"),
    ]
    assert call([*command, "--hook", "blocks.1.hook_resid_post", "--tokens", "256", "--context-length", "32"]) == 0
    cache, run = str(tmp_path / "cache"), str(tmp_path / "run")
    sized = ["--d-sae", "32", "--k", "4", "--epochs", "1", "--batch-size", "32"]
    for after in (
        ["train", cache, *sized, "--out", run],
        ["evaluate", run, "--cache", cache, "--lm-tokens", "32"],
        ["index", run, "--cache", cache],
        ["convert", run, str(tmp_path / "dash"), "--to", "saedashboard", "--cache", cache],
        ["steer", run, "--latent", "3", "--strength", "2max", "--prompt", "the", "--max-new-tokens", "2"],
    ):
        assert call(after) == 0, after
    assert asked == []


@pytest.mark.filterwarnings("ignore")
def test_a_hub_id_does_ask(asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="could not be fetched"):
        load("nobody/nothing")
    assert asked

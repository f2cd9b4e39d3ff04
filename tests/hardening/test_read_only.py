"""Folders that may be read and not written: reading works, writing is refused in one line.

Root may write anywhere, whatever the modes say; as root these tests give up its identity for the time of a command.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from saelab import ActivationCache
from tests.hardening.place import Place, call, evaluate, index, make, refused, train

NOBODY = 65534


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("closed")
    np.save(folder / "acts.npy", np.ones((40, 4), np.float32))
    return make(folder)


@pytest.fixture
def locked(place: Place) -> Iterator[Place]:
    """The place with every folder and file read-only, seen by someone who is not root."""
    paths = [place.folder, *place.folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    parents = [p for p in place.folder.parents if p.stat().st_uid == os.geteuid() and not p.stat().st_mode & 0o001]
    opened = {path: path.stat().st_mode for path in parents}
    for path in parents:
        path.chmod(opened[path] | 0o011)
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield place
    finally:
        if root:
            os.seteuid(0)
        for path, mode in {**modes, **opened}.items():
            path.chmod(mode)


def test_the_folder_is_read_only_indeed(locked: Place) -> None:
    with pytest.raises(PermissionError):
        (locked.folder / "x").write_text("x")


def test_reading_works(locked: Place) -> None:
    ActivationCache(locked.cache, verify=True)
    assert call(["inspect", str(locked.run)]) == 0
    assert call(["cache", "verify", str(locked.cache)]) == 0


@pytest.mark.parametrize("what", ["train", "evaluate", "index", "convert", "merge", "overwrite"])
def test_writing_is_refused_in_one_line(what: str, locked: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = locked.folder / "new"
    command = {
        "train": train(locked, out),
        "evaluate": evaluate(locked),
        "index": index(locked, "--overwrite"),
        "convert": ["convert", str(locked.run), str(out), "--to", "sparsify"],
        "merge": ["cache", "merge", str(locked.cache), str(locked.cache), "--out", str(out)],
        "overwrite": ["cache", "import", str(locked.folder / "acts.npy"), "--out", str(locked.cache), "--overwrite"],
    }[what]
    said = refused(command, capsys)
    assert "Permission denied" in said and "choose a folder that you may write to" in said, said
    ActivationCache(locked.cache, verify=True)
    assert not out.exists()

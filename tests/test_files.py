"""Files and folders appear complete or not at all, readable by whom the umask lets, and one process writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saelab import files
from saelab.errors import UserError

# Another program, here or on another host of the same file system, in the middle of making the folder ARGV[1].
OTHER = """
import sys
from pathlib import Path
from saelab.files import new_folder
with new_folder(Path(sys.argv[1]), overwrite=True) as partial:
    (partial / "half").write_text("x")
    print(partial, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that is writing ``tmp_path/made``, and the folder it fills."""
    args = [sys.executable, "-c", OTHER, str(tmp_path / "made")]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_umask_decides_who_may_read(tmp_path: Path, umask: None) -> None:
    files.write_json(tmp_path / "a.json", {})
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    with files.new_folder(tmp_path / "made") as partial:
        (partial / "x").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"a.json": 0o640, "a.safetensors": 0o640, "made": 0o750}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, 1)
    with pytest.raises(TypeError):
        files.write_json(path, object())

    def half(partial: Path) -> None:
        partial.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, half)
    assert path.read_text() == "1\n" and names(tmp_path) == ["a.json"]


def test_a_new_folder_appears_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "deep" / "made") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "deep" / "made").exists()
    assert names(tmp_path / "deep") == ["made"] and names(tmp_path / "deep" / "made") == ["x"]
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "deep" / "made", overwrite=True) as partial:
        (partial / "y").write_text("2")
        raise KeyboardInterrupt
    assert names(tmp_path / "deep") == ["made"] and names(tmp_path / "deep" / "made") == ["x"]
    with pytest.raises(UserError, match="exists; name a new folder"), files.new_folder(tmp_path / "deep" / "made"):
        pass
    with files.new_folder(tmp_path / "deep" / "made", overwrite=True) as partial:
        (partial / "y").write_text("2")
    assert names(tmp_path / "deep") == ["made"] and names(tmp_path / "deep" / "made") == ["y"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.new_folder(tmp_path / "made") as partial:
        (partial / "old").touch()
    rename, asked = Path.rename, []

    def fails_once(self: Path, target: Path) -> Path:
        asked.append(target.name)
        if asked.count("made") == 1 and target.name == "made":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="no"), files.new_folder(tmp_path / "made", overwrite=True) as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["old"]


def test_what_another_process_is_writing_stays_until_it_is_dead(
    other: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, half = other
    said = f"another process is writing {tmp_path / 'made'}; wait for it"
    with pytest.raises(UserError, match=said), files.new_folder(tmp_path / "made", overwrite=True):
        pass
    assert names(half) == ["half"]
    process.kill()
    process.wait()
    assert half.exists()
    with files.new_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == ["made"]


def test_waiting_for_another_process(other: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    process, _ = other
    assert process.stdin is not None
    process.stdin.close()  # it finishes
    with pytest.raises(UserError, match="exists"), files.new_folder(tmp_path / "made", wait=True):
        pass
    assert names(tmp_path / "made") == ["half"]


@pytest.mark.parametrize("name", [".made-backup", ".made.old", ".made", ".other.0123abcd.partial"])
def test_folders_of_the_user_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with files.new_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == sorted([name, "made"])


def test_a_lock_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("kept", "new"):
        with files.lock(tmp_path / name), files.lock(tmp_path / name):
            assert names(tmp_path / name) == [files.LOCK]
    with files.lock(tmp_path / "written"):
        (tmp_path / "written" / "x").touch()
    assert names(tmp_path) == ["kept", "written"] and names(tmp_path / "written") == ["x"]


def test_leftovers_of_every_writer_are_found(tmp_path: Path) -> None:
    for name in (".a.json.0123abcd.partial", ".shard_00000.safetensors.partial", ".mine", "other.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".made.0123abcd.partial" / "deep").mkdir(parents=True)
    files.remove_partial(tmp_path)
    assert names(tmp_path) == [".mine", "other.partial"]


def test_windows_is_given_what_it_can_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens no folders, and refuses to write out a file that is open for reading only."""
    fcntl = pytest.importorskip("fcntl")
    opened, synced = os.open, []

    def open_as_windows(path: Path, flags: int, *rest: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest)

    def sync_as_windows(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced.append(handle)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", open_as_windows)
    monkeypatch.setattr(os, "fsync", sync_as_windows)
    files.write_json(tmp_path / "a.json", {"ł": 1})
    files.sync(tmp_path)
    files.sync(tmp_path / "a.json")
    assert len(synced) == 2 and (tmp_path / "a.json").read_text(encoding="utf-8").startswith("{")


def test_the_place_of_what_can_be_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SAELAB_CACHE", raising=False)
    assert files.cache_home() == tmp_path / ".cache" / "saelab"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert files.cache_home() == tmp_path / "xdg" / "saelab"
    monkeypatch.setenv("SAELAB_CACHE", "~/own")
    assert files.cache_home() == tmp_path / "own"
    monkeypatch.setenv("SAELAB_CACHE", "~nobody-of-this-name/own")
    with pytest.raises(UserError, match="SAELAB_CACHE=~nobody-of-this-name/own is in the home of no user"):
        files.cache_home()

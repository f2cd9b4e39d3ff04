"""--overwrite replaces what the same command wrote, and nothing else: no cache, no folder of other files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.files import LOCK

GRID = '[train]\nepochs = 1\nbatch_size = 100\n[[grid]]\nvariant = "topk"\nd_sae = 16\nk = 2\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    ActivationCache.from_tensors(tmp_path / "cache", torch.randn(400, 8))
    (tmp_path / "grid.toml").write_text(GRID)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("the only copy")
    return tmp_path


def line(command: str, place: Path, cache: Path, out: Path) -> list[str]:
    if command == "train":
        options = ["--d-sae", "16", "--k", "2", "--epochs", "1", "--batch-size", "100"]
        return ["train", str(cache), *options, "--device", "cpu", "--out", str(out)]
    return ["sweep", str(cache), str(place / "grid.toml"), "--device", "cpu", "--out", str(out)]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize("out", ["cache", "notes", "."])
def test_what_the_command_did_not_write_stays(
    command: str, out: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(place)
    for option in ([], ["--overwrite"]):
        said = refused([*line(command, place, place / "cache", place / out), *option], capsys)
        assert "of an earlier run: it stays; name another folder" in said
    assert files(place) == before


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_run_is_replaced_but_not_with_the_cache_in_it(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, inside = place / "out", place / "out" / "cache"
    main(line(command, place, place / "cache", out))
    main([*line(command, place, place / "cache", out), "--overwrite"])
    (place / "cache").rename(inside)
    before = files(inside)
    said = refused([*line(command, place, inside, out), "--overwrite"], capsys)
    assert "which is read: it is not replaced" in said
    assert files(inside) == before and before

"""A full disk at each writer: one line, exit code 2, nothing half-written that passes for whole, and it can go on.

Two ways to fill it: a limit on the size of files, which works everywhere and hits any byte of any file, and a small
file system in memory, which only root can mount. The first gives EFBIG, the second ENOSPC.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from saelab import ActivationCache
from saelab.errors import UserError
from saelab.features import FeatureIndex
from saelab.interop import load
from saelab.layout import WEIGHTS
from saelab.sae.weights import load_sae
from saelab.steering import Recipe
from saelab.sweep import load_results
from tests import tiny_lm
from tests.hardening.place import Place, call, evaluate, index, make, refused, train

GRID = '[train]\nepochs = 1\nbatch_size = 100\n[[grid]]\nvariant = "topk"\nd_sae = 24\nk = [2, 3]\n'
LIMITS = [0, 200, 1500]  # bytes a file may have


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a language model as wide as the run, a text and activations of elsewhere."""
    place = make(tmp_path_factory.mktemp("full"))
    tiny_lm.save_llama(place.folder / "llama", hidden_size=8)
    (place.folder / "grid.toml").write_text(GRID)
    (place.folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": tiny_lm.sentences(300, i)}) + "\n" for i in (0, 1))
    )
    np.save(place.folder / "acts.npy", np.random.default_rng(0).standard_normal((300, 8), np.float32))
    return place


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of any file fails in this block, as if the disk were full there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def merge(place: Place, out: Path) -> list[str]:
    return ["cache", "merge", str(place.cache), str(place.cache), "--out", str(out)]


def convert(to: str) -> Callable[[Place, Path], list[str]]:
    return lambda place, out: ["convert", str(place.run), str(out), "--to", to]


def sweep(place: Place, out: Path) -> list[str]:
    return ["sweep", str(place.cache), str(place.folder / "grid.toml"), "--out", str(out), "--device", "cpu"]


def harvest(place: Place, out: Path) -> list[str]:
    size = ["--tokens", "480", "--context-length", "12", "--pass-tokens", "48", "--shard-bytes", "8192"]
    model = ["--model", str(place.folder / "llama"), "--hook", "blocks.1.hook_mlp_out", "--dtype", "float32"]
    return ["harvest", *model, "--text", str(place.folder / "text.jsonl"), *size, "--out", str(out)]


def import_cache(place: Place, out: Path) -> list[str]:
    return ["cache", "import", str(place.folder / "acts.npy"), "--out", str(out)]


def recipe(place: Place, out: Path) -> list[str]:
    """One that holds vectors, and one that holds an SAE."""
    what = ["--latent", "3", "--operation", "clamp", "--strength", "2"]
    return ["steer", str(place.run), *what, "--model", str(place.folder / "llama"), "--save", str(out)]


# writer -> its command, and how its product is opened
WRITERS: dict[str, tuple[Callable[[Place, Path], list[str]], Callable[[Path], object]]] = {
    "train": (train, load_sae),
    "merge": (merge, ActivationCache),
    "saelens": (convert("saelens"), load),
    "sparsify": (convert("sparsify"), load),
    "dictionary-learning": (convert("dictionary-learning"), load),
    "saelab": (convert("saelab"), load_sae),
    "sweep": (sweep, load_results),
    "harvest": (harvest, ActivationCache),
    "import": (import_cache, ActivationCache),
    "recipe": (recipe, Recipe.load),
}
BEGUN = ("train", "sweep", "harvest")  # what they have written so far may be gone on with, or replaced


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", WRITERS)
def test_writer_says_so_and_leaves_nothing_that_passes_for_whole(
    name: str, limit: int, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, opened = WRITERS[name]
    out = tmp_path / "out"
    with files_at_most(limit):
        said = refused(command(place, out), capsys)
    assert "File too large" in said and "free some space" in said, said
    with pytest.raises(UserError):
        opened(out)
    assert not [
        path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.suffix in {".partial", ".tmp"}
    ]
    if name not in BEGUN:
        assert not list(tmp_path.iterdir())
    again = [*command(place, out), *(["--overwrite"] if name in BEGUN and out.exists() else [])]
    assert call(again) == 0
    opened(out)


@pytest.mark.parametrize("limit", LIMITS)
def test_index_keeps_the_old_one(limit: int, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = FeatureIndex(place.run).table()
    with files_at_most(limit):
        said = refused(index(place, "--overwrite"), capsys)
    assert "File too large" in said or "free some space" in said, said
    assert FeatureIndex(place.run).table().equals(before)
    assert [path.name for path in place.run.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("limit", [0, 200])
def test_evaluation_keeps_the_old_one(limit: int, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place.run / "evaluation.json").read_bytes()
    with files_at_most(limit):
        refused(evaluate(place), capsys)
    assert (place.run / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize("name", ["sweep.parquet", "report.html"])
def test_results_of_a_sweep_are_whole_or_missing(
    name: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(sweep(place, tmp_path / "whole")) == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir() if path.is_file()}
    assert sizes["sweep.json"] < sizes["sweep.parquet"] < sizes["report.html"], "the limit should hit the last"
    out = tmp_path / "other"
    before = {"sweep.json"} if name == "sweep.parquet" else set(sizes) - {name}  # in the order of writing
    # Both hold processor seconds, so a second sweep's are a few bytes longer or shorter.
    with files_at_most((sizes[name] + max(sizes[n] for n in before)) // 2):
        refused(sweep(place, out), capsys)
    assert {path.name for path in out.iterdir() if path.is_file()} == before
    assert call([*sweep(place, out), "--resume"]) == 0
    tables = [[row | {"cpu_seconds": None} for row in load_results(folder)] for folder in (out, tmp_path / "whole")]
    assert tables[0] == tables[1]


def test_training_goes_on_from_its_checkpoint(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk fills up in the middle of a run; with room again, --resume ends where an undisturbed run does."""
    steps = ["--epochs", "8", "--checkpoint-steps", "10"]
    assert call([*train(place, tmp_path / "whole"), *steps]) == 0
    size = (tmp_path / "whole" / "metrics.jsonl").stat().st_size
    weights = (tmp_path / "whole" / WEIGHTS).stat().st_size
    assert size // 2 > 4 * weights // 3, "the log, not a checkpoint, should reach the limit"
    with files_at_most(size // 2):
        refused([*train(place, tmp_path / "out"), *steps], capsys)
    assert call([*train(place, tmp_path / "out"), *steps, "--resume"]) == 0
    for name, value in load_sae(tmp_path / "whole").state_dict().items():
        assert torch.equal(load_sae(tmp_path / "out").state_dict()[name], value), name


def test_cache_from_tensors(tmp_path: Path) -> None:
    with files_at_most(2000), pytest.raises(OSError, match="File too large"):
        ActivationCache.from_tensors(tmp_path / "cache", torch.randn(400, 8))
    with pytest.raises(UserError, match=r"unfinished|not an activation cache"):
        ActivationCache(tmp_path / "cache")
    assert ActivationCache.from_tensors(tmp_path / "cache", torch.randn(40, 8), overwrite=True).n_rows == 40


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, or as many as the test says."""
    size = getattr(request, "param", 64)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, capture_output=True)


@pytest.mark.parametrize("name", WRITERS)
def test_writers_on_a_full_file_system(
    name: str, place: Place, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, opened = WRITERS[name]
    (small_disk / "ballast").write_bytes(bytes(60 << 10))
    said = refused(command(place, small_disk / "out"), capsys)
    assert "No space left" in said, said
    with pytest.raises(UserError):
        opened(small_disk / "out")
    (small_disk / "ballast").unlink()


@pytest.mark.parametrize(
    ("name", "small_disk", "room"), [("harvest", 128, 24), ("sweep", 8192, 16)], indirect=["small_disk"]
)
def test_work_on_a_full_file_system_goes_on_where_it_stopped(
    name: str, room: int, place: Place, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off in the middle, and with space again ``--resume`` ends in the very bytes of an undisturbed command.

    ``room`` is how many KiB are free at first.
    """

    def files(folder: Path) -> dict[str, bytes]:
        paths = [p for p in folder.rglob("*") if p.suffix in {".safetensors", ".json", ".jsonl"}]
        # An evaluation tells how long it took.
        return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "evaluation.json"}

    command, opened = WRITERS[name]
    assert call(command(place, tmp_path / "whole")) == 0
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).total - (room << 10)))
    assert "No space left" in refused(command(place, small_disk / "out"), capsys)
    begun = [path for path in (small_disk / "out").rglob("*") if path.is_file()]
    assert begun, "it should have got somewhere"
    (small_disk / "ballast").unlink()
    assert call([*command(place, small_disk / "out"), "--resume"]) == 0
    opened(small_disk / "out")
    assert files(small_disk / "out") == files(tmp_path / "whole")

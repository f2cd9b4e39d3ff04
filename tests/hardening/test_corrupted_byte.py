"""One wrong byte in any file we read: it is named, or it does not matter; never a traceback."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hardening.place import Place, call, evaluate, index, make, train

FLIPS = 8  # positions a file: its ends, and random ones


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(place: Place, tmp_path: Path) -> Place:
    shutil.copytree(place.folder, tmp_path / "copy")
    folder = tmp_path / "copy"
    return Place(folder, folder / "cache", folder / "run")


def resume(copy: Place) -> list[str]:
    """A training that was stopped before its end, to be gone on with."""
    return [*train(copy, copy.folder / "stopped"), "--epochs", "8", "--resume"]


READERS: dict[str, list[Callable[[Place], list[str]]]] = {
    "cache/manifest.json": [lambda p: ["cache", "info", str(p.cache)], lambda p: train(p, p.folder / "new")],
    "cache/shard_00000.safetensors": [
        lambda p: ["cache", "verify", str(p.cache)],
        lambda p: train(p, p.folder / "new"),
        lambda p: evaluate(p),
    ],
    "cache/tokens.json": [lambda p: index(p, "--overwrite")],
    "run/cfg.json": [lambda p: ["inspect", str(p.run)], evaluate],
    "run/sae_weights.safetensors": [lambda p: ["inspect", str(p.run)], evaluate],
    "run/evaluation.json": [lambda p: ["inspect", str(p.run)]],
    "run/run.json": [lambda p: [*train(p, p.run), "--resume"]],
    "run/features/features.parquet": [lambda p: ["convert", str(p.run), str(p.folder / "new"), "--to", "saedashboard"]],
    "run/features/examples.parquet": [lambda p: ["convert", str(p.run), str(p.folder / "new"), "--to", "saedashboard"]],
    "budget/saelab_extra.safetensors": [
        lambda p: ["inspect", str(p.folder / "budget")],
        lambda p: evaluate(p._replace(run=p.folder / "budget")),
    ],
    "stopped/run.json": [resume],
    "stopped/metrics.jsonl": [resume],
    "stopped/checkpoints/step/train_state.json": [resume],
    "stopped/checkpoints/step/train_state.safetensors": [resume],
    "stopped/checkpoints/step/sae_weights.safetensors": [resume],
    "sparsify/cfg.json": [lambda p: ["inspect", str(p.folder / "sparsify")]],
    "sparsify/sae.safetensors": [lambda p: ["inspect", str(p.folder / "sparsify")]],
    "dictionary-learning/config.json": [lambda p: ["inspect", str(p.folder / "dictionary-learning")]],
    "dictionary-learning/ae.pt": [lambda p: ["inspect", str(p.folder / "dictionary-learning")]],
    "grid.toml": [lambda p: ["sweep", str(p.cache), str(p.folder / "grid.toml"), "--out", str(p.folder / "new")]],
}


@pytest.fixture(scope="module", autouse=True)
def _more(place: Place) -> None:
    """Files that only other commands make: a stopped training, a file beside the weights, exports, a grid."""
    from saelab import ActivationCache, build
    from saelab.training import TrainConfig, fit_steps
    from saelab.training.checkpoints import latest_step

    cache, folder = ActivationCache(place.cache), place.folder / "stopped"
    config = TrainConfig(batch_size=100, epochs=8)
    steps = fit_steps(build("topk", cache.d_in, 24, k=3), cache, config, folder)
    for _ in range(6):
        next(steps)
    steps.close()
    newest = latest_step(folder)
    assert newest is not None
    for to in ("sparsify", "dictionary-learning"):
        assert call(["convert", str(place.run), str(place.folder / to), "--to", to]) == 0
    assert call([*train(place, place.folder / "budget"), "--variant", "batch_topk"]) == 0
    (place.folder / "grid.toml").write_text('[train]\nepochs = 1\n[[grid]]\nvariant = "topk"\nd_sae = 24\nk = [2, 3]\n')


@pytest.mark.filterwarnings("ignore")  # a flipped byte in a number may well overflow somewhere
@pytest.mark.parametrize("name", READERS)
def test_a_flipped_byte_is_named_or_harmless(name: str, copy: Place, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy.folder / name
    if not path.exists():
        path = next((copy.folder / "stopped" / "checkpoints").glob("step_*")) / path.name
    whole = path.read_bytes()
    kept = {p: p.read_bytes() for p in copy.folder.rglob("*") if p.is_file()} if "stopped" in name else {}
    rng = random.Random(name)
    places = [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(FLIPS))]
    refused = 0
    for position in places:
        broken = bytearray(whole)
        broken[position] ^= rng.choice([0x01, 0x10, 0x80, 0xFF])
        path.write_bytes(broken)
        for command in READERS[name]:
            capsys.readouterr()
            code = call(command(copy))
            said = "".join(capsys.readouterr())
            assert code in {0, 2}, said
            assert "Traceback" not in said
            if code == 2:
                refused += 1
                assert said.count("error:") == 1, said
                flat = said.replace("\n", "")
                assert path.name in flat or str(path.parent) in flat or "d_in" in flat or "is not" in flat, said
            shutil.rmtree(copy.folder / "new", ignore_errors=True)
            for file, content in kept.items():
                if file != path:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
    assert refused, "no flipped byte was noticed"

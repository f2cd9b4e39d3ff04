"""Run folders in an object store: trained, resumed, measured, indexed and browsed through local copies."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab import ActivationCache, TrainConfig, build, stores, train
from saelab.cli import main
from saelab.cli.commands import app
from saelab.copies import LISTING, STATE, Copy, carry_all, place_of, pull_tree
from saelab.data.cache.storage import Folder
from saelab.errors import UserError
from saelab.features import FeatureIndex
from saelab.files import write_json
from saelab.runs import Run
from saelab.sae import SAE
from saelab.stores import Store
from saelab.training import fit_steps
from saelab.training.checkpoints import latest_step
from saelab.training.remote import carrier_of, run_folder
from tests.hardening.place import D_IN, TRAIN


def files(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {name: store.read(name) for name in store.sizes()}


def write(folder: Path, **content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Act as another machine: with other copies."""
    return lambda name: monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / name))


def fresh() -> SAE:
    torch.manual_seed(0)
    return build("topk", d_in=D_IN, d_sae=24, k=3)


def make_cache(path: Path | str) -> ActivationCache:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (600,), generator=generator)
    words = [f" w{i}" for i in range(40)]
    acts = torch.randn(600, D_IN, generator=generator)
    return ActivationCache.from_tensors(path, acts, tokens, context_length=20, vocabulary=words, shard_rows=300)


def test_commands_on_urls(bucket: str, tmp_path: Path, elsewhere: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, evaluate and index with everything behind URLs; the files are those of the same commands on folders."""
    for cache, run in ((f"{bucket}/cache", f"{bucket}/runs/a"), (str(tmp_path / "cache"), str(tmp_path / "a"))):
        make_cache(cache)
        main(["train", cache, "--out", run, *TRAIN])
        main(["evaluate", run, "--cache", cache, "--lm-tokens", "0", "--batch-size", "256"])
        main(["index", run, "--cache", cache, "--top", "2", "--model", "none"])
    assert f"carried to {bucket}/runs/a" in capsys.readouterr().err
    there = files(f"{bucket}/runs/a")
    assert there.keys() == {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.*")} | {LISTING}
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert there[name] == (tmp_path / "a" / name).read_bytes()
    other = json.loads((tmp_path / "a/evaluation.json").read_bytes())
    assert json.loads(there["evaluation.json"])["metrics"] == other["metrics"]
    elsewhere("second")
    run = Run.open(f"{bucket}/runs/a")
    assert FeatureIndex(f"{bucket}/runs/a").table().equals(FeatureIndex(tmp_path / "a").table())
    assert run.origin == f"{bucket}/runs/a" and run.name == "a" and run.index is not None
    with pytest.raises(SystemExit):
        main(["train", f"{bucket}/cache", "--out", f"{bucket}/runs/a", *TRAIN])
    assert f"{bucket}/runs/a exists; add --overwrite" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=f"{bucket}/x cannot be written by this command"):
        write_json(Path(f"{bucket}/x"), {})
    # What the app shows is a copy of the runs, without activations.
    root = pull_tree(bucket)
    assert set(Run.scan(root)) == {"runs/a"} and not list(root.rglob("shard_*"))
    assert not list(Path().glob("s3:*"))


def test_a_run_killed_on_one_machine_is_resumed_on_another(
    bucket: str, tmp_path: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "cache")
    cache, config = ActivationCache(tmp_path / "cache"), TrainConfig(batch_size=50, epochs=1)
    sae = fresh()
    train(sae, cache, config, tmp_path / "whole")
    with run_folder(f"{bucket}/run") as folder:
        assert folder is not None
        carrier = carrier_of(folder)[0]
        steps = fit_steps(fresh(), cache, config, folder, checkpoint_steps=4)
        for metrics in steps:
            while metrics.step == 5 and latest_step(folder) is None:
                time.sleep(0.01)  # a thread writes it
            carrier._last = -10.0
            carrier.write({})
            carrier.close()
            if metrics.step == 6:
                break
        killed = files(f"{bucket}/run")  # the state in the store if the process were killed here
        steps.close()
    listed = json.loads(killed[LISTING])["files"]
    assert {name.split("/")[1] for name in listed if name.startswith("checkpoints/")} == {"step_00000004"}
    store = Store(f"{bucket}/run")
    for name in store.sizes().keys() - killed.keys():
        store.remove(name)
    for name, data in killed.items():
        store.write(name, data)
    elsewhere("second")
    monkeypatch.setattr(stores, "BEAT", 0.2)  # the lock of the killed process is watched before it is taken over
    train(fresh(), cache, config, f"{bucket}/run", resume=True)
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert store.read(name) == (tmp_path / "whole" / name).read_bytes()
    assert not [name for name in store.sizes() if name.startswith("checkpoints/")]
    with pytest.raises(UserError, match="exists; add --overwrite to replace it"):
        train(sae, cache, config, f"{bucket}/run")


def test_no_state_between_two_is_read(bucket: str, s3_server: Any, elsewhere: Any, monkeypatch: Any) -> None:
    """Whatever upload is the last before a kill, another machine gets whole files of the list, or one line."""
    monkeypatch.setattr("saelab.copies.PAUSE", 0.0)
    copy = Copy(f"{bucket}/run")
    write(copy.folder, a="one" * 10, b="one", log="1\n")
    write(copy.folder / "deep", c="one")
    copy.push()
    for allowed in range(7):
        elsewhere(f"writer{allowed}")
        copy = Copy(f"{bucket}/run")
        copy.pull()
        write(copy.folder, a=f"new {allowed}", log="1\n" * (allowed + 2), d=f"new {allowed}")
        (copy.folder / "b").unlink(missing_ok=True)
        left = [allowed]

        def kill(method: str, path: str, number: int, left: list[int] = left) -> tuple[int, str] | None:
            if method in ("PUT", "DELETE"):
                left[0] -= 1
            return (403, "ExpiredToken") if left[0] < 0 and method in ("PUT", "DELETE") else None

        with s3_server.faulty(kill):
            try:
                copy.push()
            except UserError as error:
                assert "ExpiredToken" in str(error)
        elsewhere(f"reader{allowed}")
        other = Copy(f"{bucket}/run")
        found = {p.name: p.read_text() for p in other.pull().rglob("*") if p.is_file() and p.name != STATE}
        assert found["c"] == "one"
        # All of one writer, all of the state before the first, or neither a nor d.
        assert found.get("a") == found["d"] if "d" in found else found.get("a") in (None, "one" * 10)
        assert ("b" in found) == (found.get("a") == "one" * 10)
        assert set(found["log"]) == {"1", "\n"} and found["log"].endswith("\n")
        if found.get("d") == f"new {allowed}":
            assert found["log"] == "1\n" * (allowed + 2)
            break
    else:
        pytest.fail("no push was complete")


def test_two_that_change_one_folder(bucket: str, elsewhere: Any) -> None:
    first = Copy(f"{bucket}/run")
    write(first.folder, a="one", notes="mine")
    first.push()
    elsewhere("second")
    second = Copy(f"{bucket}/run")
    second.pull()
    write(second.folder, a="two")
    write(first.folder, a="three", own="kept")
    second.push()
    with pytest.raises(UserError, match=r"was changed by another process; the results are in .*home"):
        first.push()
    with pytest.raises(UserError, match=r"a has changed both in s3://.* and in its copy .*; remove the copy"):
        first.pull()
    write(first.folder, a="two")
    first.pull()
    first.push()
    assert files(f"{bucket}/run")["own"] == b"kept"
    assert second.pull() and (second.folder / "own").read_text() == "kept"
    (first.folder / "own").unlink()
    first.push()
    second.pull()
    assert not (second.folder / "own").exists() and "own" not in files(f"{bucket}/run")


def test_the_app_follows_the_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy is refreshed while the server runs, and a fault of the store does not end it."""
    store = Store(f"{bucket}/runs")
    store.write("a/cfg.json", b"{}")
    store.write("b/cfg.json", b"{}")
    root = pull_tree(f"{bucket}/runs")
    waits: list[float] = []

    class Server:
        returncode = None

        def __init__(self, *args: object, **options: object) -> None: ...

        def wait(self, timeout: float) -> int:
            waits.append(timeout)
            if len(waits) == 1:
                store.write("a/cfg.json", b"[1]")
                store.remove("b/cfg.json")
            if len(waits) == 2:
                monkeypatch.setattr("saelab.cli.commands.app.pull_tree", fails)
            if len(waits) == 4:
                return 7
            raise subprocess.TimeoutExpired("app", timeout)

        def poll(self) -> int:
            return 7

    def fails(url: str) -> None:
        raise OSError("no answer")

    monkeypatch.setattr("saelab.cli.commands.app.subprocess.Popen", Server)
    assert app.serve_copy(f"{bucket}/runs", [], {}) == 7 and len(waits) == 4
    assert {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*.json") if p.name != STATE} == {
        "a/cfg.json": "[1]"
    }


@pytest.mark.parametrize("command", [["sweep", "c", "g"], ["convert", "r"], ["steer-eval", "r"], ["reproduce", "topk"]])
def test_commands_that_write_to_folders_only(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = ["s3://b/x", "--to", "saelab"] if command[0] == "convert" else ["--out", "s3://b/x"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, *out])
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and said.startswith("error: s3://b/x cannot be written by this command"), said


def test_a_folder_that_another_tool_wrote(bucket: str) -> None:
    store = Store(f"{bucket}/foreign")
    with pytest.raises(UserError, match=r"foreign holds nothing; check the address"):
        Run.open(f"{bucket}/foreign")
    store.write("cfg.json", b"{}")
    copy = Copy(f"{bucket}/foreign")
    assert (copy.pull() / "cfg.json").read_text() == "{}"
    store.write("cfg.json", b"[]")  # of the same size
    assert (copy.pull() / "cfg.json").read_text() == "[]"
    assert LISTING not in store.sizes() and carry_all() == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:evil"])
def test_a_list_cannot_name_a_place_outside(bucket: str, name: str) -> None:
    store = Store(f"{bucket}/run")
    store.write(LISTING, json.dumps({"revision": "1", "files": {name: [1, "x"]}}).encode())
    with pytest.raises(UserError, match=r"listing.json is damaged .*does not lie in the folder"):
        Copy(f"{bucket}/run").pull()


def test_a_damaged_object_is_not_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.copies.PAUSE", 0.0)
    copy = Copy(f"{bucket}/run")
    write(copy.folder, a="one")
    copy.push()
    Folder(f"{bucket}/run").write("a", b"two")
    shutil.rmtree(place_of(f"{bucket}/run"))
    with pytest.raises(UserError, match=r"is being written, or damaged: its files do not fit listing.json"):
        Copy(f"{bucket}/run").pull()

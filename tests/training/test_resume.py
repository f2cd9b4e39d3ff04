"""A run that is stopped, killed or crashed, then resumed, ends in the very bytes of one that never was."""

from __future__ import annotations

import errno
import inspect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.files import write_tensors
from saelab.sae import VARIANTS, build
from saelab.sae.weights import load_metadata, load_sae
from saelab.training import TrainConfig, TrainState, checkpoints, fit_steps, start, train_steps
from saelab.training.checkpoints import Snapshot, latest_step
from tests.planted import activations, contents

D_IN, D_SAE = 8, 20
SMALL = {"k": 3, "n_steps": 3, "target_l0": 3.0}
CONFIG = TrainConfig(epochs=2, batch_size=128, lr=1e-2, dead_after=200, ema=0.9)  # 12 steps


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    grads = torch.randn(900, D_IN, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("resume") / "cache"
    return ActivationCache.from_tensors(path, activations(900, D_IN), grads=grads, held_out=0.1)


def fresh(variant: str = "topk"):
    torch.manual_seed(0)
    options = inspect.signature(VARIANTS[variant]).parameters
    return build(variant, D_IN, D_SAE, **{name: value for name, value in SMALL.items() if name in options})


def run(cache: ActivationCache, folder: Path, variant: str = "topk", stop: int | None = None, **options) -> None:
    generator = fit_steps(fresh(variant), cache, CONFIG, folder, **options)
    for metrics in generator:
        if metrics.step == stop:
            generator.close()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_resuming_is_bit_exact_for_every_variant(cache: ActivationCache, tmp_path: Path, variant: str) -> None:
    run(cache, tmp_path / "whole", variant)
    run(cache, tmp_path / "parts", variant, stop=4)
    torch.manual_seed(99)
    torch.rand(5)
    run(cache, tmp_path / "parts", variant, stop=9, resume=True)
    run(cache, tmp_path / "parts", variant, resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert set(contents(tmp_path / "whole")) - {"saelab_extra.safetensors"} == {
        "cfg.json",
        "metrics.jsonl",
        "run.json",
        "sae_weights.safetensors",
    }


@pytest.mark.parametrize("variant", ["topk", "batch_topk"])
def test_a_state_passed_on_in_memory_continues_exactly(cache: ActivationCache, variant: str) -> None:
    def rows(stops: list[int]) -> tuple[list[dict], dict[str, torch.Tensor]]:
        sae, logged = fresh(variant), []
        state = start(sae, cache, config := CONFIG.resolved(sae, cache))
        for stop in stops:
            for metrics in train_steps(sae, cache, config, state):
                logged.append(metrics.row())
                if metrics.step == stop:
                    break
        return logged, sae.state_dict()

    whole, weights = rows([12])
    parts, same = rows([5, 6, 12])
    assert parts == whole
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_checkpoint_is_usable_on_its_own(cache: ActivationCache, tmp_path: Path) -> None:
    generator = fit_steps(sae := fresh(), cache, CONFIG, tmp_path / "run", checkpoint_steps=5)
    for _ in range(7):
        next(generator)
    path = written(tmp_path / "run", 5)
    assert path.name == "step_00000005"
    generator.close()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000007"]
    loaded = load_sae(tmp_path / "run" / "checkpoints" / "step_00000007")
    x = cache.read([3, 5, 8]).acts
    assert torch.equal(loaded(x), sae.eval()(x))


def written(folder: Path, step: int) -> Path:
    """The checkpoint of a step, once the thread has written it."""
    for _ in range(1000):
        path = latest_step(folder)
        if path is not None and path.name == f"step_{step:08d}":
            return path
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} in {folder}")


def test_checkpoints_come_by_time(cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    generator, found = fit_steps(fresh(), cache, CONFIG, tmp_path / "run", checkpoint_minutes=5), []
    monkeypatch.setattr(Snapshot, "write", lambda self, folder: found.append(self.step))
    for metrics in itertools.islice(generator, 11):
        now += 100.0 if metrics.step < 8 else 0.0  # seconds
    assert found == [4, 7]
    generator.close()
    assert found == [4, 7, 11]


def test_training_goes_on_while_a_checkpoint_is_written(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes three steps; the checkpoint holds the weights of its own step, not of a later one."""
    run(cache, tmp_path / "short", stop=5)
    real, gate = Snapshot.write, threading.Event()

    def slow(self: Snapshot, folder: Path) -> None:
        assert gate.wait(60)
        real(self, folder)

    generator = fit_steps(fresh(), cache, CONFIG, folder := tmp_path / "run", checkpoint_steps=5)
    monkeypatch.setattr(Snapshot, "write", slow)
    steps = [metrics.step for metrics in itertools.islice(generator, 8)]
    assert steps == [*range(1, 9)] and latest_step(folder) is None
    gate.set()
    path = written(folder, 5)
    expected = tmp_path / "short" / "checkpoints" / "step_00000005"
    for name in sorted(p.name for p in expected.iterdir()):
        assert (path / name).read_bytes() == (expected / name).read_bytes(), name
    generator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "saelab-checkpoint"]


def test_what_goes_wrong_in_writing_ends_the_run_at_the_next_step(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cache, tmp_path / "whole")
    generator = fit_steps(fresh(), cache, CONFIG, folder := tmp_path / "run", checkpoint_steps=3)
    for _ in range(4):
        next(generator)
    written(folder, 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "commit_step", full)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(20):
            next(generator)
            for thread in threading.enumerate():
                if thread.name == "saelab-checkpoint":
                    thread.join()
    monkeypatch.undo()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000003"]
    run(cache, folder, resume=True)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"checkpoint_steps": 0}, {"checkpoint_minutes": 0.0}], ids=str)
def test_an_interval_of_nothing_is_refused(options: dict, cache: ActivationCache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be"):
        fit_steps(fresh(), cache, CONFIG, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_last_good_checkpoint_survives_a_crash_in_the_middle_of_saving(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cache, tmp_path / "whole")
    real, folder = write_tensors, tmp_path / "run"
    for at, broken in enumerate(("sae_weights.safetensors", "train_state.safetensors", "rename")):
        good = 3 + at

        def crash(path: Path, *args, broken: str = broken) -> None:
            if path.name == broken:
                path.write_bytes(b"half a file")
                raise KeyboardInterrupt
            real(path, *args)

        run(cache, folder, stop=good, resume=at > 0)
        for module in ("sae.weights", "training.checkpoints"):
            monkeypatch.setattr(f"saelab.{module}.write_tensors", crash)
        if broken == "rename":
            monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(cache, folder, stop=good + 2, resume=True)
        monkeypatch.undo()
        assert latest_step(folder).name == f"step_{good:08d}"
    run(cache, folder, resume=True)
    assert contents(folder) == contents(tmp_path / "whole")


def test_state_round_trip_keeps_strides_and_bits(cache: ActivationCache) -> None:
    sae = fresh()
    state = start(sae, cache, config := CONFIG.resolved(sae, cache))
    generator = train_steps(sae, cache, config, state)
    for _ in range(3):
        next(generator)
    generator.close()
    tensors = {name: value.contiguous().clone() for name, value in state.tensors(sae).items()}
    again = TrainState.restore(sae, tensors, json.loads(json.dumps(state.scalars())))
    for parameter in sae.parameters():
        for key, value in state.optimizer.state[parameter].items():
            restored = again.optimizer.state[parameter][key]
            assert torch.equal(restored, value) and restored.stride() == value.stride()
    assert again.scalars() == state.scalars() and set(again.ema) == set(state.ema)
    with pytest.raises(UserError, match="does not belong to this SAE"):
        TrainState.restore(build("topk", D_IN, D_SAE + 1, k=2), tensors, state.scalars())


def command(cache: ActivationCache, folder: Path, *more: str) -> list[str]:
    config = ["--d-sae", str(D_SAE), "--k", "3", "--batch-size", "32", "--epochs", "4", "--ema", "0.9"]
    options = ["--checkpoint-steps", "3", "--lr", "0.01", "--dead-after", "200", *config, *more]
    return ["train", str(cache.path), "--out", str(folder), *options]


def spawn(args: list[str]) -> subprocess.Popen:
    code = "import torch, sys; torch.set_num_threads(1); from saelab.cli import main; main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(folder: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)
    raise AssertionError("the run did not start")


@pytest.mark.slow
def test_killed_at_random_and_stopped_by_a_signal_then_resumed(cache: ActivationCache, tmp_path: Path) -> None:
    main(command(cache, tmp_path / "whole"))
    folder, dice = tmp_path / "run", random.Random(os.getpid())
    for number, low in ((signal.SIGKILL, 5), (signal.SIGTERM, 45)):
        process = spawn(command(cache, folder, "--resume"))
        wait_for_steps(folder, low + dice.randrange(40))
        while latest_step(folder) is None:  # a thread writes it, and a killed process has nothing else
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), output
        assert load_sae(latest_step(folder)).d_sae == D_SAE
    assert "SIGTERM: saved at step" in output
    main(["train", str(cache.path), "--out", str(folder), "--resume"])  # the settings come from the run
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_resumed_run_refuses_another_cache_and_other_settings(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(cache, tmp_path / "run", stop=3)
    other = ActivationCache.from_tensors(tmp_path / "other", torch.randn(900, D_IN), held_out=0.1)
    with pytest.raises(UserError, match=r"is not the one .* was trained on"):
        next(fit_steps(fresh(), other, CONFIG, tmp_path / "run", resume=True))
    with pytest.raises(UserError, match="trains a topk SAE, not abs_topk"):
        next(fit_steps(fresh("abs_topk"), cache, CONFIG, tmp_path / "run", resume=True))
    with pytest.raises(SystemExit) as caught:
        main(["train", str(cache.path), "--out", str(tmp_path / "run"), "--resume", "--lr", "0.5"])
    assert caught.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "lr=0.5 differs from lr=0.01" in message and "Traceback" not in message


def test_a_resumed_run_refuses_a_cache_whose_bytes_changed(tmp_path: Path) -> None:
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(900, D_IN), held_out=0.1)
    run(cache, tmp_path / "run", stop=3)
    shard = tmp_path / "cache" / "shard_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard_00000.safetensors is corrupted"):
        run(ActivationCache(tmp_path / "cache"), tmp_path / "run", resume=True)


def test_the_command_leaves_nothing_behind_after_a_mistake(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(cache, done := tmp_path / "done")
    before = contents(done)
    cases = [
        (command(cache, tmp_path / "new", "--batch-size", "5000"), "batch_size=5000 exceeds the 810 training rows"),
        (command(cache, tmp_path / "new", "--k", "21"), "k=21 is outside 1..d_sae=20"),
        (command(cache, tmp_path / "new", "--device", "cuda:7"), "device 'cuda:7' is not available here"),
        (command(cache, tmp_path / "new", "--device", "meta"), "device 'meta' is not available here"),
        (command(cache, tmp_path / "new", "--checkpoint-steps", "0"), "checkpoint_steps=0 must be at least 1"),
        (command(cache, done, "--overwrite", "--batch-size", "5000"), "batch_size=5000 exceeds"),
        (command(cache, done), "exists; add --overwrite"),
        (["train", str(tmp_path / "none"), "--out", str(tmp_path / "new")], "is not an activation cache"),
    ]
    for args, message in cases:
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists() and contents(done) == before


def test_metrics_hold_every_step_and_nothing_of_the_clock(cache: ActivationCache, tmp_path: Path) -> None:
    run(cache, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == {"step", "tokens", "loss", "fvu", "l0", "dead", "lr", "grad_norm"}
    weights = load_file(tmp_path / "run" / "sae_weights.safetensors")
    assert torch.allclose(weights["W_dec"].norm(dim=1), torch.ones(D_SAE), atol=1e-6)
    about = load_metadata(tmp_path / "run")
    assert about["cache_fingerprint"] == cache.fingerprint and about["train"]["ema"] == 0.9


def test_what_a_kill_left_half_written_is_removed(cache: ActivationCache, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    main(command(cache, whole))
    folder.mkdir()
    # The last is how several processes call it while they write it together.
    for name in (".run.json.0a1b2c3d.partial", ".sae_weights.safetensors.partial"):
        (folder / name).write_text("half")
    (folder / ".mine").write_text("not ours")
    main(command(cache, folder, "--resume"))
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()} | {".mine"}

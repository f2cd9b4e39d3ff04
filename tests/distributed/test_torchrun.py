"""Processes that torchrun starts: one that dies or hangs, starting again, and errors that all of them have."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.files import lock
from saelab.sae.weights import load_sae
from saelab.stores import Store
from saelab.training import remote
from saelab.training.remote import shared_folder
from tests import tiny_lm

D_IN, D_SAE = 16, 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    acts = torch.randn(900, D_IN, generator=torch.Generator().manual_seed(0))
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("torchrun") / "cache", acts, held_out=0.1)


def torchrun(*args: str, processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts)] if restarts else []
    # The kernels of each process would be compiled anew.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SAELAB_KERNELS": "reference"}
    return subprocess.Popen(
        [*command, "-m", "saelab", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def second_of(process: subprocess.Popen, log: Path, steps: int) -> int:
    """The number of the second process, once so many steps are logged."""
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_bytes().count(b"\n") > steps) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1])


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


@pytest.mark.minutes
def test_a_rank_that_dies_starts_again_and_one_that_hangs_is_named(cache: ActivationCache, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ["--d-sae", str(D_SAE), "--k", "3", "--batch-size", "32", "--epochs", "40"]
    args = ["train", cache.path, "--out", str(run), *options, "--checkpoint-steps", "10", "--timeout-s", "10"]
    process, log = torchrun(*args, restarts=1), run / "metrics.jsonl"
    os.kill(second_of(process, log, 25), signal.SIGKILL)
    # The processes that take over have written more once the log is longer than it can have been before.
    stopped = second_of(process, log, 25 + log.read_bytes().count(b"\n"))
    os.kill(stopped, signal.SIGSTOP)
    started = time.monotonic()
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    assert process.returncode != 0 and time.monotonic() - started < 120
    assert "exitcode: -9" in output or "SIGKILL" in output, output
    told = errors(output)
    assert any("process 1 of 2 has ended or does not answer" in line for line in told) and len(told) <= 2, output
    with lock(run):
        output, _ = torchrun(*args, "--resume").communicate(timeout=240)
    assert errors(output) == [f"error: another process is writing {run}; wait for it, or choose another folder"]
    output, _ = torchrun(*args, "--resume", "--dict-ranks", "2", "--json").communicate(timeout=240)
    result = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    assert result["step"] == 40 * (810 // 32)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, result["step"] + 1))
    assert load_sae(run).d_sae == D_SAE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "told", "said"),
    [
        ("63", ["error: d_sae=63 does not divide over 2 dictionary ranks; take a multiple"], "d_sae=63 "),
        pytest.param("wide", [], "wide", marks=pytest.mark.minutes),  # test_failures.py asks for it in one process
    ],
)
def test_bad_input_is_refused_in_one_line(
    cache: ActivationCache, tmp_path: Path, width: str, told: list[str], said: str
) -> None:
    args = ["train", cache.path, "--out", str(tmp_path / "run"), "--dict-ranks", "2", "--k", "3", "--d-sae", width]
    output, _ = torchrun(*args).communicate(timeout=240)
    assert errors(output) == told and output.count(said) == 1, output
    assert output.count("Traceback") <= 1, output  # torchrun's own
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.minutes  # tests/harvesting/test_harvest.py compares the same files without torchrun
def test_torchrun_harvests_the_files_of_one_process(tmp_path: Path) -> None:
    tiny_lm.save_llama(tmp_path / "llama")
    texts = [json.dumps({"text": tiny_lm.sentences(200, seed)}) + "\n" for seed in range(3)]
    (tmp_path / "text.jsonl").write_text("".join(texts))
    source = ["--model", str(tmp_path / "llama"), "--text", str(tmp_path / "text.jsonl"), "--device", "cpu"]
    size = ["--tokens", "600", "--context-length", "16", "--pass-tokens", "32", "--shard-bytes", "8192"]
    hooks = ["--hook", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post", "--gradients"]
    command = ["harvest", *source, *size, *hooks]
    many = torchrun(*command, "--out", str(tmp_path / "many"))
    main([*command, "--out", str(tmp_path / "one")])
    output, _ = many.communicate(timeout=120)
    assert many.returncode == 0, output
    assert output.count("saved to") == 2, output  # a line a hook, by the main process alone
    files = [
        {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for folder in (tmp_path / "many", tmp_path / "one")
    ]
    assert sum("shard" in name for name in files[0]) > 4
    assert files[0] == files[1]


@pytest.mark.minutes
def test_a_run_in_object_storage_is_that_in_a_folder(cache: ActivationCache, tmp_path: Path, bucket: str) -> None:
    """Of processes on one machine, which share the local copy."""
    args = ["--d-sae", str(D_SAE), "--k", "3", "--batch-size", "32", "--dict-ranks", "2"]
    args += ["--epochs", "3", "--checkpoint-steps", "5"]
    url, folder = f"{bucket}/runs/a", tmp_path / "a"
    started = [torchrun("train", cache.path, "--out", out, *args) for out in (url, str(folder))]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert [output.count(f"carried to {url}") for output in outputs] == [1, 0], outputs
    store = Store(url)
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert store.read(name) == (folder / name).read_bytes()
    assert not [name for name in store.sizes() if name.startswith("checkpoints/")]


def test_processes_on_several_machines_share_no_copy(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "home"))
    for name, value in {"TORCHELASTIC_RUN_ID": "0", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["train", cache.path, "--out", "s3://bucket/run", "--k", "3"])
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: s3://bucket/run is written in a copy on this machine, and torchrun started")
    assert not (tmp_path / "home").exists()


def test_processes_that_are_started_again_go_on_in_the_copy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(remote, "let_others_go_on", lambda: told.append(True))
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyboardInterrupt), shared_folder(f"{bucket}/run") as folder:
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt
    assert told == [True]
    with pytest.raises(UserError, match="exists; add --overwrite"), shared_folder(f"{bucket}/run"):
        pass
    assert told == [True]  # the others do not begin
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with shared_folder(f"{bucket}/run") as folder:
        assert (folder / "checkpoint").read_text() == "half"

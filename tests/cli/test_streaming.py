"""``train`` and ``sweep`` that harvest while they train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from saelab import cli
from saelab.cli.streaming import count
from saelab.data.cache import ActivationCache
from saelab.runs import Run
from saelab.workspace.commands import train_command
from tests import tiny_lm
from tests.planted import contents

SMALL = """--context-length 16 --pass-tokens 64 --tokens 2k --cache-gb 0.01 --window-tokens 640 --sample-tokens 200
--held-out-tokens 200 --hook blocks.1.hook_resid_post --device cpu"""
SAE = "--d-sae 24 --k 4 --batch-size 64"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    tiny_lm.save_llama(folder / "model", num_hidden_layers=2)
    documents = [{"text": tiny_lm.sentences(60, seed)} for seed in range(120)]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    (folder / "grid.toml").write_text(
        '[train]\nbatch_size = 64\n[[grid]]\nvariant = ["topk", "batch_topk"]\nd_sae = 24\nk = 4\n', encoding="utf-8"
    )
    return folder


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(" ".join(words).split())
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def stream(out: str) -> str:
    return f"--model model --text text.jsonl {SMALL} --out {out}"


def test_train_evaluate_and_repeat_by_the_recorded_command(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(f"train {stream('run')} {SAE}".split())
    shown = capsys.readouterr()
    assert "rolling: 2,000 activations of blocks.1.hook_resid_post" in " ".join(shown.err.split())
    assert "lr auto" in shown.err
    assert "31 steps" in shown.err
    cache = ActivationCache(there / "run-cache", verify=True)
    assert not (there / "run-cache" / "segments").exists()
    cli.main(["evaluate", "run", "--cache", "run-cache", "--lm-tokens", "0"])
    assert json.loads((there / "run" / "evaluation.json").read_text(encoding="utf-8"))["metrics"]["fvu"]["value"] > 0
    assert cache.n_split("held_out") > 100
    command = train_command(Run.open(there / "run"))
    assert command is not None
    assert "--epochs" not in command
    words = command.replace("--out run", "--out repeated").split()[1:]
    cli.main([*words, "--pass-tokens", "64", "--device", "cpu"])
    assert contents(there / "repeated")["sae_weights.safetensors"] == contents(there / "run")["sae_weights.safetensors"]


def test_a_sweep_on_one_stream(there: Path) -> None:
    cli.main(f"sweep grid.toml {stream('sweep')}".split())
    rows = pq.read_table(there / "sweep" / "sweep.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert all(0 < row["fvu"] < 2 for row in rows)
    assert (there / "sweep-cache" / "manifest.json").is_file()


def test_refusals_come_before_any_work(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "full").mkdir(exist_ok=True)
    (there / "full" / "file").touch()
    assert "full exists and holds no run.json or sweep.json of an earlier run" in refused(
        "train", stream("full"), SAE, capsys=capsys
    )
    too_small = refused("train", stream("new").replace("0.01", "0.0001"), SAE, capsys=capsys)
    assert "cannot hold two shuffle windows of 640 tokens" in too_small
    assert not (there / "new-cache").exists()
    assert not (there / "new").exists()
    assert "batch_size=2048 exceeds" in refused("train", stream("new"), "--d-sae 24 --k 4", capsys=capsys)
    assert not (there / "new-cache").exists()
    (there / "tuned.toml").write_text('[[grid]]\nvariant = "topk"\nd_sae = 24\nk = 4\nlr = "tune"\n', encoding="utf-8")
    assert "reads the activations several times" in refused("sweep tuned.toml", stream("new"), capsys=capsys)
    assert not list(there.glob("new*"))
    words = [*f"train {stream('new')} {SAE} --epochs 3".split()]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --hook a b", "--hook a b: one place is harvested while training"),
        ("train --hook blocks.*.hook_resid_post", "one place is harvested while training"),
        ("train --target out", "--target: a transcoder needs the activations of two places"),
        ("train --skip", "--skip: a transcoder needs the activations of two places"),
        ("train --lr tune", "compares rates in a sweep"),
        ("train acts", "acts: with --tokens, --text, --cache-gb or --window-tokens activations are harvested"),
        ("sweep acts grid.toml", "acts: with --tokens"),
        ("sweep grid.toml --workers 2", "--workers: one process trains all SAEs of a stream"),
        ("sweep grid.toml --device cpu cpu", "--device cpu cpu: one process trains all SAEs of a stream"),
        ("sweep coders.toml", "target: a transcoder needs the activations of two places"),
        ("sweep places.toml", "chooses among several caches"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_a_model_is_read(
    there: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    for name, key in (("coders", 'target = "b"'), ("places", 'cache = ["a", "b"]')):
        (there / f"{name}.toml").write_text(f'[[grid]]\nvariant = "topk"\nd_sae = 24\nk = 4\n{key}\n', encoding="utf-8")
    rest = "--out no --tokens 2k --model no-such-model --text text.jsonl"
    first, *others = words.split(" --")
    options = "".join(f" --{other}" for other in others)
    told = refused(f"{first} {rest}{options}", capsys=capsys)
    assert said in told and told.count("error:") == 1 and "│" not in told
    assert not list(there.glob("no*"))


def test_torchrun_is_refused_before_the_processes_meet(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli.commands.train, "start_world", lambda *_: pytest.fail("they met"))
    assert "takes one process" in refused("train", stream("no"), SAE, capsys=capsys)


def test_halving_on_one_stream(there: Path) -> None:
    """SAEs are stopped between two segments, and the others read on."""
    (there / "halving.toml").write_text(
        '[train]\nbatch_size = 64\n[[grid]]\nvariant = "topk"\nd_sae = 24\nk = 4\nlr = [1e-5, 3e-3]\n'
        "[halving]\nat = [0.3]\n",
        encoding="utf-8",
    )
    cli.main(f"sweep halving.toml {stream('halved')}".split())
    rows = {row["lr"]: row for row in pq.read_table(there / "halved" / "sweep.parquet").to_pylist()}
    assert (rows[1e-5]["status"], rows[3e-3]["status"]) == ("halted", "finished")
    assert rows[1e-5]["step"] == 9 and rows[3e-3]["step"] == 31


def test_the_help_of_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for words in (["train", "--help"], ["train", "--tokens", "1", "--help"], ["sweep", "--tokens", "1", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    assert "--cache-gb" not in shown[0]
    assert "--tokens" in shown[0]
    for text in shown[1:]:
        assert all(name in text for name in ("--cache-gb", "--model-device", "--window-tokens", "--held-out-tokens"))
        assert "--held-out " not in text
    assert "--gradients" not in shown[1]


def test_numbers_of_tokens() -> None:
    assert [count(text) for text in ("1000", "1_000", "20k", "1.5M", "1B", "2e9")] == [
        *(1000, 1000, 20_000, 1_500_000, 10**9, 2 * 10**9)
    ]
    for wrong in ("1.0001k5", "many", "0.5"):
        with pytest.raises(ValueError):
            count(wrong)


@pytest.mark.slow
@pytest.mark.minutes  # training/test_rolling.py resumes a cut stream, training/test_resume.py a killed process
def test_a_killed_process_resumes_to_the_same_bytes(there: Path) -> None:
    """SIGKILL, and SIGTERM, at moments of the machine's choosing."""
    cli.main(f"train {stream('whole')} {SAE}".split())
    command = [sys.executable, "-m", "saelab", *f"train {stream('killed')} {SAE} --checkpoint-steps 5".split()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for number, marks in ((signal.SIGKILL, "killed/checkpoints/step_00000010"), (signal.SIGTERM, "killed/run.json")):
        process = subprocess.Popen([*command, "--resume"], env=environment, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 120
        while not (there / marks).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=120)
    cli.main([*command[3:], "--resume"])
    assert contents(there / "killed")["sae_weights.safetensors"] == contents(there / "whole")["sae_weights.safetensors"]
    assert contents(there / "killed")["metrics.jsonl"] == contents(there / "whole")["metrics.jsonl"]

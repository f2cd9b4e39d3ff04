"""The ``torchrun`` lines of *From a laptop to a cluster* run, with two processes on gloo in place of many GPUs."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.sae.weights import load_sae
from tests import tiny_lm

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "cluster.md"
LINES = re.findall(r"^    (torchrun .*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
SIZES = {"--tokens": "4000", "--d-sae": "64", "--k": "4", "--dict-ranks": "2"}


def small(line: str) -> list[str]:
    """The line for two processes, with small sizes; without a meeting place it is one machine."""
    words = shlex.split(line)
    nodes = 2 if "--nnodes" in words else 1
    for option, value in (SIZES | {"--nproc-per-node": str(2 // nodes)}).items():
        for place in [i for i, word in enumerate(words) if word == option]:
            words[place + 1] = value
    words = [word.replace("blocks.9.", "blocks.2.") for word in words]
    if "train" in words and "--resume" not in words:
        words += ["--batch-size", "64", "--epochs", "1"]
    return [sys.executable, "-m", "torch.distributed.run", *words[1:]]


@pytest.mark.minutes
def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_lm.save_llama(tmp_path / "my-model")
    documents = [{"text": tiny_lm.sentences(80, seed)} for seed in range(70)]
    (tmp_path / "my-text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    environment = os.environ | {"PYTHONPATH": str(PAGE.parents[2]), "OMP_NUM_THREADS": "1"}
    assert len(LINES) == 4
    for line in LINES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [word.replace("node0:29500", f"localhost:{port}") for word in small(line)]
        words += ["--epochs", "1"] if "--resume" in words else []
        started = [words] * (2 if "--nnodes" in words else 1)
        running = [
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            for words in started
        ]
        for process in running:
            said = process.communicate(timeout=900)[0]
            assert process.returncode == 0, f"{line}\n{said}"
    ActivationCache(tmp_path / "big-cache").verify()
    weights = [load_sae(tmp_path / name).W_dec for name in ("big", "two-nodes")]
    assert weights[0].shape == (64, 16) and weights[0].equal(weights[1])  # both have two dictionary ranks
    common = ["--variant", "topk", "--k", "4", "--d-sae", "64", "--batch-size", "64", "--epochs", "1"]
    main(["train", "big-cache", *common, "--device", "cpu", "--out", "one"])
    assert (load_sae(tmp_path / "one").W_dec - weights[0]).abs().max() < 1e-4

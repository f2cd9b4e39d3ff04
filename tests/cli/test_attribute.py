"""``saelab attribute``: what it prints and writes, steering from it, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelab import cli
from saelab.attribution import read_graph
from saelab.layout import RECIPE
from saelab.lm import load_model
from saelab.lm.record import ModelRecord
from saelab.sae import build
from saelab.sae.weights import save
from tests.steering.models import D_MODEL, HOOK, folder

PROMPT = "w4 w9 w17 w30"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE that records its model and hook point."""
    path = tmp_path_factory.mktemp("run") / "sae"
    sae = build("topk", d_in=D_MODEL, d_sae=48, k=4).eval()
    record = ModelRecord.of(load_model(folder()), folder())
    save(sae, path, {"model_name": folder(), "hook_name": HOOK, "language_model": record.to_json()})
    return path


def test_it_prints_writes_and_steers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["attribute", str(run), "--prompt", PROMPT, "--target", "w5", "--against", "w6"]
    writes = ["--out", str(tmp_path / "graph.json"), "--figure", str(tmp_path / "graph.html")]
    steers = ["--steer", "2", "--recipe", str(tmp_path / "recipe"), "--max-new-tokens", "2"]
    cli.main([*args, *writes, *steers])
    shown = capsys.readouterr().out
    graph = read_graph(tmp_path / "graph.json")
    assert f"{graph.value:+.3f}" in shown and graph.latents[0].id in shown
    for words in ("faithfulness", "completeness", "of the influence", "have the sign", "unsteered", "steered"):
        assert words in shown
    assert (tmp_path / "recipe" / RECIPE).is_file()
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert graph.latents[0].id in page and "<html" in page


def test_json_on_stdout_is_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["attribute", str(run), "--prompt", PROMPT, "--json", "--out", str(tmp_path / "graph.json")])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "graph.json").read_text())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", PROMPT, "--out", "graph.txt"], "does not end in .json"),
        (["--prompt", PROMPT, "--figure", "graph.png"], "does not end in .html"),
        (["--prompt", PROMPT, "--operation", "delete"], "unknown operation"),
        (["--prompt", PROMPT, "--recipe", "somewhere"], "needs the latents"),
        (["--prompt", PROMPT, "--steer", "9_9_9"], "has no node"),
        (["--prompt", PROMPT, "--keep", "2"], "keep=2"),
        (["--prompt", PROMPT, "--mode", "frozen", "--of", "logprob"], "is not linear"),
    ],
)
def test_bad_input_is_one_line(run: Path, args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["attribute", str(run), *args])
    found = capsys.readouterr().err
    assert caught.value.code == 2 and words in found and "Traceback" not in found

"""Tokens that break naive code, all the way: vocabulary, cache, index, bundle, HTML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache, build
from saelab.features import FeatureIndex, build_index
from saelab.features.saedashboard import write_dashboard
from saelab.sae.weights import load_sae, save
from saelab.viz.theme import LIGHT
from saelab.viz.tokens import example_list, token_chips
from tests.hardening.place import call

HOSTILE = [
    "",
    " ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "\x1b[31m",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</div>",
    "&lt;&amp;",
    "[red]",
    "[/]",
    "[/bold]",
    "{{7*7}}",
    "${x}",
    "$\\alpha$",
    "`code`",
    "| a | b |",
    "# heading",
    "';DROP TABLE--",
    "%s%n",
    "\\u0000",
    "../../etc/passwd",
    "\u202eright to left",
    "\u200b\u200d\ufeff",
    "e\u0301",
    "👩\u200d👩\u200d👧",
    "\U0010ffff",
    "\ufffd",
    "\ud800",  # half of a character, as byte-level vocabularies may give
    "a" * 5000,
    "null",
    "NaN",
    "-1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    tokens = torch.arange(1050) % len(HOSTILE)
    acts = torch.nn.functional.one_hot(tokens, len(HOSTILE)).float() @ torch.randn(len(HOSTILE), 12)
    cache = ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=21, vocabulary=HOSTILE)
    sae = build("abs_topk", 12, 40, k=2).eval()
    save(sae, folder / "run", {})
    build_index(sae, cache, folder / "run")
    return folder / "run"


def readable(text: str) -> str:
    """What a text becomes that no file can hold."""
    return text.replace("\ud800", "\ufffd")


def test_the_index_gives_every_token_back(run: Path) -> None:
    index, cache = FeatureIndex(run), ActivationCache(run.parent / "cache")
    assert cache.token_strings(range(len(HOSTILE))) == [readable(text) for text in HOSTILE]
    seen = set()
    for latent in range(40):
        for pole in (1, -1):
            assert index.latent(latent, pole)["top_tokens"] is not None
            for example in index.examples(latent, pole):
                assert example.strings == cache.token_strings(example.tokens)
                seen |= set(example.strings)
    assert seen == {readable(text) for text in HOSTILE}


def test_html_holds_no_markup_of_theirs(run: Path) -> None:
    index = FeatureIndex(run)
    examples = [e for latent in range(40) for pole in (1, -1) for e in index.examples(latent, pole, "top")]
    page = example_list(examples, LIGHT) + token_chips(HOSTILE, [1.0] * len(HOSTILE), LIGHT)
    assert "&lt;script&gt;" in page
    for bad in ("<script", "<img", "\x00", "\x1b", "\u202e"):
        assert bad not in page
    page.encode()


def test_bundle_and_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = FeatureIndex(run)
    folder = write_dashboard(index, load_sae(run), tmp_path / "bundle")
    for path in folder.glob("batch-*.json"):
        json.loads(path.read_text())
    assert call(["index", str(run), "--cache", str(run.parent / "cache"), "--overwrite"]) == 0
    assert call(["cache", "info", str(run.parent / "cache")]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["[red]x[/red]", "a b", "ü\u202e", "-x", "'\"", "$(touch x)", "x" * 200])
def test_folders_with_such_names(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / name
    assert call(["convert", str(run), str(out), "--to", "saelab"]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert name in shown or len(name) > 100
    assert call(["inspect", str(out)]) == 0
    assert not (tmp_path / "x").exists()

"""Positions at the start of a text that an SAE was not trained on: recorded by its run, not counted by a reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saelab.data.text import from_documents
from saelab.features import search
from saelab.harvesting import HarvestConfig, harvest
from saelab.lm import load_model
from saelab.prompt.reading import read_prompt
from saelab.runs import Run
from saelab.runs.language_model import untrained_start
from saelab.sae import build
from saelab.training import TrainConfig, train
from tests import tiny_lm

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_lm.save_llama(tmp_path_factory.mktemp("llama")), device="cpu")


@pytest.mark.parametrize(
    ("bos", "skip", "first"),
    [("context", 1, 1), ("context", 0, 0), ("none", 1, 1), ("none", 3, 3), ("none", 0, 0), ("document", 0, 1)],
)
def test_what_was_not_trained_on_is_not_counted(model: Any, tmp_path: Path, bos: Any, skip: int, first: int) -> None:
    text = from_documents([tiny_lm.sentences(60, seed) for seed in range(6)])
    config = HarvestConfig(tokens=320, context_length=16, bos=bos, skip_first=skip, dtype="float32")
    cache = harvest(model, HOOK, text, tmp_path / "cache", config)
    sae = build("topk", cache.d_in, 24, k=4)
    train(sae, cache, TrainConfig(epochs=1, batch_size=64), out=tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert untrained_start(run) == first
    start: dict[str, Any] = {"bos": bool(run.metadata["prepend_bos"]), "skip_first": untrained_start(run)}
    reading = read_prompt(model, run.sae, "the cat sat on the old roofs", HOOK, **start)
    assert reading.first == first
    assert reading.front == (bos != "none")
    assert "".join(reading.strings[reading.front :]) == "the cat sat on the old roofs"
    fired = {latent for position in range(first, reading.n) for latent, _ in reading.active(position)}
    assert {latent for latent, _ in reading.strongest(24)} == fired
    alone = read_prompt(model, run.sae, "the", HOOK, **start)
    assert alone.first == min(first, alone.n - 1)  # a text has at least one position that counts


def test_an_sae_that_says_nothing_of_it_was_not_trained_on_bos() -> None:
    sae = build("topk", 16, 24, k=4)
    assert untrained_start(Run(sae, HOOK)) == 1


def test_without_a_bos_token_nothing_stands_in_front(tmp_path: Path) -> None:
    """The marks of a search by example are counted from the first token of the text."""
    model = load_model(tiny_lm.save_qwen2(tmp_path / "qwen2"), device="cpu")
    sae = build("topk", 16, 24, k=4)
    reading = read_prompt(model, sae, "the cat sat", HOOK)
    assert (reading.front, reading.first) == (0, 1)  # its first token is an attention sink like BOS
    marks = search.tokens_in(reading.strings, [(4, 7)], offset=reading.front)
    assert "".join(s for s, marked in zip(reading.strings, marks) if marked).strip() == "cat"

"""Texts longer than a model's positions, and tokens outside its embedding, are refused in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.errors import UserError
from saelab.harvesting import HarvestConfig, harvest
from saelab.lm import load_model
from saelab.lm.limits import check_length, check_tokens, position_limit
from saelab.steering import generate, generate_tokens
from tests import tiny_lm
from tests.zoo.families import FAMILIES, save

# Families that index a table of positions, those that compute rotations, and those that need neither.
TABLES = ("gpt2", "opt", "gpt-j", "gpt-neo", "biogpt", "mpt")
ROTATIONS = ("llama", "pythia", "gemma3-multimodal", "phi3", "falcon-7b")
NEITHER = ("bloom", "mamba", "falcon-rw", "xglm")


@pytest.mark.parametrize("name", [*TABLES, *ROTATIONS, *NEITHER])
def test_the_limit_is_where_the_model_fails(name: str) -> None:
    model = FAMILIES[name].build()
    limit, is_table = position_limit(model)
    assert (limit, is_table) == (None if name in NEITHER else 64, name in TABLES)
    ids = torch.randint(9, 300, (1, 65))
    with torch.no_grad():
        model(input_ids=ids[:, :64], use_cache=False)
        if is_table:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, use_cache=False)
            with pytest.raises(UserError, match="of 65 tokens is longer than the 64 positions of the model"):
                check_length(model, 65)
        else:
            model(input_ids=ids, use_cache=False)
            check_length(model, 65)
    check_length(model, 64)


def test_a_rotary_model_says_when_it_leaves_its_range(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        check_length(FAMILIES["llama"].build(), 65)
    assert "65 tokens is longer than the 64 that the model was made for" in caplog.text


def test_harvest_and_generation_refuse_before_they_run(tmp_path: Path) -> None:
    model = load_model(save("gpt2", tmp_path / "m"), device="cpu")
    (tmp_path / "t.txt").write_text(tiny_lm.sentences(300))
    with pytest.raises(UserError, match="a context of 65 tokens is longer than the 64 positions"):
        harvest(model, "blocks.1.hook_resid_post", tmp_path / "t.txt", tmp_path / "c", HarvestConfig(200, 65))
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="with its continuation of 71 tokens"):
        generate_tokens(model, torch.tensor([[0] * 61]), max_new_tokens=10)
    assert len(generate_tokens(model, torch.tensor([[5] * 54]), max_new_tokens=10)[0]) == 10


def test_tokens_without_a_row_in_the_embedding_are_named(tmp_path: Path) -> None:
    model = load_model(save("llama", tmp_path / "m"), device="cpu")
    model.tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # without resizing the embedding
    beyond = model.tokenizer.pad_token_id
    for ids in (torch.tensor([[3, 319]]), torch.empty(0, dtype=torch.int64)):
        check_tokens(model, ids)
    message = rf"gives token {beyond} \('\[PAD\]'\), the model's embedding has 320 rows"
    with pytest.raises(UserError, match=message):
        check_tokens(model, torch.tensor([[3, beyond]]), model.tokenizer)
    (tmp_path / "t.txt").write_text("the cat sat [PAD] on a mat " * 20)
    with pytest.raises(UserError, match=message):
        harvest(model, "blocks.1.hook_resid_post", tmp_path / "t.txt", tmp_path / "c", HarvestConfig(100, 10))
    with pytest.raises(UserError, match="embedding has 320 rows"):
        generate(model, "the cat [PAD] sat", max_new_tokens=2)
    assert generate(model, ["the cat sat on a mat", "rain"], max_new_tokens=2)  # padding is masked

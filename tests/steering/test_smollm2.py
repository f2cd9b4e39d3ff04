"""On the real demo model: cached, uncached and padded generation write the same tokens, through every entrance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.lm import load_hf_model, load_model
from saelab.lm.sites import underlying
from saelab.lm.tokens import tokenize
from saelab.sae import build
from saelab.steering import Add, Clamp, Intervention, Recipe, Run, Scale, SteeringVector, attach, generate_tokens
from saelab.steering.directions import difference_of_means

pytestmark = pytest.mark.smollm2
HOOK, NEW = "blocks.9.hook_resid_post", 4
PROMPTS = ["The weather today is", "My favourite recipe starts with a bowl of"]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def vector(model: Any) -> SteeringVector:
    sea = ["The ship sailed across the stormy sea.", "Waves broke over the deck of the boat."]
    office = ["The meeting was moved to Thursday morning.", "She signed the contract and sent the invoice."]
    return difference_of_means(model, HOOK, sea, office)


@pytest.fixture(scope="module")
def run() -> Run:
    torch.manual_seed(0)
    return Run(build("topk", d_in=576, d_sae=2304, k=32).eval(), HOOK)


def steering(name: str, vector: SteeringVector, run: Run) -> list[Intervention]:
    return {
        "add": [Add(vector, "0.8norm")],
        "add_generated": [Add(vector, "1norm", where="generated")],
        "sae": [Clamp(run, 100, 60.0), Scale(run, 7, 3.0)],
    }[name]


# test_situations.py asks the same of all operations on small models.
@pytest.mark.parametrize(
    "name", [*(pytest.param(one, marks=pytest.mark.minutes) for one in ("add", "add_generated")), "sae"]
)
def test_every_way_of_generating_writes_the_same_tokens(
    name: str, model: Any, vector: SteeringVector, run: Run
) -> None:
    interventions, options = steering(name, vector, run), {"max_new_tokens": NEW}
    ids, mask = tokenize(model.tokenizer, PROMPTS)
    expected = generate_tokens(model, ids, mask, interventions, **options)
    assert all(len(set(row)) > 2 for row in expected), "a loop of dashes is what a lost cache writes"
    assert expected != generate_tokens(model, ids, mask, **options)
    assert expected == generate_tokens(model, ids, mask, interventions, use_cache=False, **options)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = tokenize(model.tokenizer, prompt)
        assert generate_tokens(model, alone, None, interventions, **options) == [expected[row]]
    with attach(model, interventions):
        out = underlying(model).generate(
            ids, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
        assert out[:, ids.shape[1] :].tolist() == expected
        for use_cache in (True, False):
            alone, _ = tokenize(model.tokenizer, PROMPTS[0])
            out = model.generate(
                alone, use_past_kv_cache=use_cache, do_sample=False, stop_at_eos=False, verbose=False, **options
            )
            assert out[0, alone.shape[1] :].tolist() == expected[0]


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_hf_model("smollm2")


@pytest.mark.parametrize("name", ["add_generated", pytest.param("sae", marks=pytest.mark.minutes)])
def test_a_recipe_made_on_the_bridge_steers_the_plain_model(
    name: str, model: Any, plain: Any, vector: SteeringVector, run: Run, tmp_path: Path
) -> None:
    interventions = steering(name, vector, run)
    ids, mask = tokenize(model.tokenizer, PROMPTS)
    expected = generate_tokens(model, ids, mask, interventions, max_new_tokens=NEW)
    Recipe.of(model, interventions).save(tmp_path / "recipe")
    recipe = Recipe.load(tmp_path / "recipe")
    assert recipe.model.name == "smollm2"
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    with recipe.attach(plain):
        for use_cache in (True, False):
            out = plain.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
            assert out[:, ids.shape[1] :].tolist() == expected
        for row, prompt in enumerate(PROMPTS):
            alone, _ = tokenize(model.tokenizer, prompt)
            out = plain.generate(alone, attention_mask=torch.ones_like(alone), **options)
            assert out[0, alone.shape[1] :].tolist() == expected[row]


def test_strength_zero_and_an_exception_leave_the_models_bit_for_bit(
    model: Any, plain: Any, vector: SteeringVector
) -> None:
    ids, mask = tokenize(model.tokenizer, PROMPTS)
    for either in (model, plain):
        root = underlying(either)
        with torch.no_grad():
            expected = root(input_ids=ids, attention_mask=mask).logits
            with attach(either, Add(vector, 0.0)):
                assert torch.equal(root(input_ids=ids, attention_mask=mask).logits, expected)
            with pytest.raises(RuntimeError, match="mine"), attach(either, Add(vector, "1norm")):
                assert not torch.equal(root(input_ids=ids, attention_mask=mask).logits, expected)
                raise RuntimeError("mine")
            assert torch.equal(root(input_ids=ids, attention_mask=mask).logits, expected)

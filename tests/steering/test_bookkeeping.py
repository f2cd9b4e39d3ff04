"""SAEs that read normalised activations: what their last latents carry is no feature to steer with."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import UserError
from saelab.runs import Run
from saelab.sae import Normalised, build
from saelab.steering import Add, Clamp, SteeringVector, attribute_logits
from saelab.steering.choice import rank_latents, slope
from saelab.steering.evaluation.concepts import Concept
from saelab.steering.measure.effects import UnsteeredBaseline
from tests.steering.models import D_MODEL, HOOK, llama, tokenizer

PROMPTS = ["w5 w6 w70", "w8 w9 w11 w12 w13 w20", "w30", "w41 w42 w43"]
LATENTS = 24


def normalised(variant: str = "topk") -> Run:
    """An SAE of layer-normed activations whose offset points where w10 becomes likelier."""
    torch.manual_seed(0)
    inner = build(variant, d_in=D_MODEL, d_sae=LATENTS, k=8).eval()
    up = slope(llama(), HOOK, UnsteeredBaseline(llama(), PROMPTS, ["w10"], tokenizer=tokenizer()))
    with torch.no_grad():
        inner.b_dec.copy_(up / up.norm())
    return Run(Normalised(inner, "layer_norm").eval(), HOOK)


@pytest.mark.parametrize("variant", ["topk", "abs_topk"])
def test_no_offset_is_chosen_as_a_latent(variant: str) -> None:
    run, concept = normalised(variant), Concept("ten", ("w10",), ("w10 w10 w11",), ("w50 w51 w52",))
    found = rank_latents(llama(), run, concept, PROMPTS, candidates=60, tokenizer=tokenizer())
    poles = (1, -1) if variant == "abs_topk" else (1,)
    assert {(c.latent, c.pole) for c in found.candidates} == {(j, p) for j in range(LATENTS) for p in poles}
    assert run.sae.signed == (variant == "abs_topk")


def test_they_are_refused_by_number() -> None:
    run = normalised()
    for make in (lambda j: SteeringVector.from_latent(run, j), lambda j: Clamp(run, j, 1.0)):
        make(LATENTS - 1)
        with pytest.raises(UserError, match=f"latents 0 to {LATENTS - 1}"):
            make(LATENTS)


def test_they_count_as_error_of_an_attributed_token() -> None:
    push = SteeringVector.from_tensor(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)), HOOK)
    row = attribute_logits(
        llama(), "w5 w6 w70 w8", Add(push, 4.0), normalised(), max_new_tokens=1, tokenizer=tokenizer(), top=64
    )[0]
    assert row.top_latents and all(moved.latent < LATENTS for moved in row.top_latents)
    assert sum(moved.contribution for moved in row.top_latents) == pytest.approx(row.other_latents, abs=1e-3)
    assert row.steered + row.other_latents + row.error_term + row.gap == pytest.approx(row.change, abs=1e-3)

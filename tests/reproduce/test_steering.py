"""The rows about steering, on a tiny model whose SAEs are made so that the answer is known."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saelab.reproduce import steering
from saelab.reproduce.lab import Spec
from saelab.sae import SAE, build
from saelab.steering import SteeringVector
from saelab.steering.choice import slope
from saelab.steering.evaluation.concepts import Concept
from saelab.steering.measure.effects import UnsteeredBaseline
from tests.steering.models import D_MODEL, HOOK, llama, tokenizer

TEXTS = ("w5 w6 w70", "w8 w9 w11 w12", "w30 w31")
TEN = Concept("ten", ("w10",), ("w10 w5", "w6 w10"), ("w20 w5", "w6 w21"))
FORTY = Concept("forty", ("w40",), ("w40 w5", "w6 w40"), ("w22 w5", "w6 w23"))


def good(concepts: tuple[Concept, ...]) -> torch.Tensor:
    """The direction that raises the first concept's words, less the second's."""
    found = [
        slope(llama(), HOOK, UnsteeredBaseline(llama(), TEXTS, list(c.words), tokenizer=tokenizer())) for c in concepts
    ]
    return found[0] - (found[1] if len(found) > 1 else 0)


def sae(seed: int, *rows: torch.Tensor, variant: str = "abs_topk") -> SAE:
    torch.manual_seed(seed)
    made = build(variant, d_in=D_MODEL, d_sae=16, k=4).eval()
    with torch.no_grad():
        for number, row in enumerate(rows):
            made.W_dec[number] = row / row.norm()
    return made


def bench(saes: dict[str, SAE]) -> steering.Bench:
    plain = llama()
    model: Any = SimpleNamespace(tokenizer=tokenizer())
    cache = SimpleNamespace(hook_name=HOOK, manifest=SimpleNamespace(rms_norm=12.0, hook_name=HOOK))
    lab: Any = SimpleNamespace(cache=cache, model=model, sae=lambda spec: saes[spec.name])
    made = steering.Bench(lab, [TEN, FORTY], TEXTS, TEXTS)
    made.__dict__["model"] = plain
    return made


def specs(label: str) -> list[Spec]:
    return [Spec(label, label, 16, {"k": 4}, seed) for seed in range(3)]


def test_latents_that_write_match_the_difference_of_means_and_random_ones_do_not() -> None:
    saes = {s.name: sae(s.seed, good((TEN,)), good((FORTY,))) for s in specs("abs_topk")}
    saes |= {s.name: sae(s.seed + 9) for s in specs("topk")}
    made = bench(saes)
    row = steering.against_means(made, "abs_topk", specs("abs_topk"), "p", "s")
    json.dumps(row.content(), allow_nan=False)
    assert row.measured["difference"]["low"] > 0
    assert row.verdict == "inconclusive"  # over two concepts an interval is wide, and both must lie above
    further = steering.further_than(made, specs("abs_topk"), specs("topk"), "p", "c", "s")
    assert further.verdict == "supported" and further.measured["difference"]["low"] > 0
    assert steering.further_than(made, specs("topk"), specs("abs_topk"), "p", "c", "s").verdict == "contradicted"


def test_both_ways_is_the_weaker_of_two_and_needs_more_than_an_unsigned_latent() -> None:
    axis = good((TEN, FORTY))
    saes = {s.name: sae(s.seed, axis) for label in ("abs_topk", "topk") for s in specs(label)}
    made = bench(saes)
    up, down = made.both_ways(SteeringVector.from_tensor(axis, HOOK), (TEN, FORTY))
    back = made.both_ways(SteeringVector.from_tensor(-axis, HOOK), (TEN, FORTY))
    assert up > 0 and down > 0 and max(back) < max(up, down)
    row = steering.one_latent_both_ways(made, specs("abs_topk"), specs("topk"), "p", "s", [(TEN, FORTY)])
    assert row.measured["weaker_way"]["low"] > 0
    assert row.verdict == "not attributable"  # TopK's latent, negated, does the same: nothing about signed latents


@pytest.mark.parametrize("which", ["against", "both"])
def test_without_a_tokenizer_nothing_is_claimed(which: str) -> None:
    made = bench({})
    made.lab.model.tokenizer = None
    row = (
        steering.against_means(made, "abs_topk", specs("abs_topk"), "p", "s")
        if which == "against"
        else steering.one_latent_both_ways(made, specs("abs_topk"), specs("topk"), "p", "s")
    )
    assert row.verdict == "not testable here" and "tokenizer" in row.reason

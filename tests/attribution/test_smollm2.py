"""The demo model and a shipped SAE: what the first-order effects are worth where users begin."""

from __future__ import annotations

import pytest

from saelab.attribution import attribute
from saelab.lm import load_hf_model
from saelab.shipped import checkpoints

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


def test_ablation_confirms_the_strongest_latents_and_frozen_effects_add_up() -> None:
    """Nine of ten by sign; eight of ten by size, up to a factor of 2.5."""
    from transformers import AutoTokenizer

    from saelab.lm import smollm2_folder

    model = load_hf_model("smollm2", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    run, prompt = checkpoints() / "topk_16384", "The capital of France is"
    graph = attribute(run, prompt, " Paris", against=" London", model=model, tokenizer=tokenizer)
    assert graph.checks is not None and graph.faithfulness is not None
    assert graph.probability > 0.5 and graph.drift < 1e-4
    assert graph.checks.same_sign >= 9 and graph.checks.within(2.5) >= 8
    assert graph.faithfulness.faithfulness > 0.8
    frozen = attribute(run, prompt, " Paris", model=model, tokenizer=tokenizer, mode="frozen", check=0, max_nodes=10)
    assert abs(frozen.sums["gap"]) < 1e-3 and sum(frozen.sums.values()) == pytest.approx(frozen.value)

"""Directions from texts, effects, calibration, dose and response, attribution: on a tiny model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD

from saelab.errors import UserError
from saelab.steering import (
    Add,
    Clamp,
    ProjectOut,
    Scale,
    SteeringVector,
    attach,
    attribute_logits,
    calibrate,
    directions,
    dose_response,
    effect_size,
    generate,
    two_way,
)
from saelab.steering.directions import random_direction, text_activations
from saelab.steering.measure.attribution import named_latents
from saelab.steering.measure.calibration import activation_norm
from saelab.steering.measure.dose_response import Curve
from saelab.steering.measure.effects import UnsteeredBaseline, concept_tokens, repetition
from tests.steering.models import HOOK, bridge, llama, tokenizer
from tests.steering.test_steering import RUN, vector

POSITIVE = ["w5 w6 w7", "w8 w9 w10 w11", "w5 w9 w40 w41 w42"]
NEGATIVE = ["w50 w51 w52 w53", "w54 w55 w56", "w50 w55 w57 w58"]
PROMPTS = ["w5 w6 w70", "w81 w4 w33 w34 w35 w36", "w20 w21", "w90 w60 w61 w62 w63"]


def ids_of(text: str) -> torch.Tensor:
    """The text after BOS (token 1)."""
    return torch.tensor([[1, *tokenizer()(text, add_special_tokens=False)["input_ids"]]])


def acts(text: str) -> torch.Tensor:
    """Activations at the hook of one text alone, from the model's own hidden states."""
    with torch.no_grad():
        return llama()(input_ids=ids_of(text), output_hidden_states=True).hidden_states[2][0]


def log_probs(text: str, interventions=()) -> torch.Tensor:
    with torch.no_grad(), attach(llama(), interventions):
        return llama()(input_ids=ids_of(text)).logits[0].double().log_softmax(-1)


def test_text_activations_leave_out_padding_and_the_first_token() -> None:
    mean = text_activations(llama(), HOOK, PROMPTS, tokenizer=tokenizer())
    last = text_activations(bridge(), HOOK, PROMPTS, tokens="last")
    for row, text in enumerate(PROMPTS):
        torch.testing.assert_close(mean[row], acts(text)[1:].mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[row], acts(text)[-1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(text_activations(llama(), HOOK, ["w5"], tokenizer=tokenizer())[0], acts("w5")[1])


def test_difference_of_means_is_the_difference_of_means() -> None:
    found = directions.difference_of_means(bridge(), HOOK, POSITIVE, NEGATIVE)
    pos, neg = (torch.stack([acts(text)[1:].mean(0) for text in texts]) for texts in (POSITIVE, NEGATIVE))
    torch.testing.assert_close(found.vector, pos.mean(0) - neg.mean(0), rtol=1e-4, atol=1e-4)
    assert found.origin["kind"] == "difference_of_means"
    tokens = torch.cat([acts(text)[1:] for text in (*POSITIVE, *NEGATIVE)])  # as in a cache: of tokens, not of means
    expected = tokens.square().sum(1).mean().sqrt()
    assert activation_norm(bridge(), HOOK, [*POSITIVE, *NEGATIVE]) == pytest.approx(float(expected), rel=1e-4)
    assert found.length("2norm") == pytest.approx(2 * float(expected), rel=1e-4)
    assert found.length("1raw") == pytest.approx(float(found.vector.norm()))


def test_probe_separates_the_two_sets() -> None:
    found = directions.probe(bridge(), HOOK, POSITIVE, NEGATIVE)
    pos, neg = (text_activations(bridge(), HOOK, texts) @ found.direction for texts in (POSITIVE, NEGATIVE))
    assert pos.min() > neg.max()
    assert 0 <= found.origin["accuracy"] <= 1


def test_pca_is_the_main_axis_of_the_uncentred_differences() -> None:
    found = directions.pca(bridge(), HOOK, POSITIVE, NEGATIVE)
    rows = (text_activations(bridge(), HOOK, POSITIVE) - text_activations(bridge(), HOOK, NEGATIVE)).numpy()
    axis = TruncatedSVD(1, algorithm="arpack").fit(rows.astype(np.float64)).components_[0]
    assert abs(float(found.direction.double() @ torch.from_numpy(axis.copy()))) == pytest.approx(1, abs=1e-5)
    assert (rows @ found.direction.numpy()).mean() > 0
    with pytest.raises(UserError, match="pairs"):
        directions.pca(bridge(), HOOK, POSITIVE, NEGATIVE[:2])


def test_vectors_add_and_remember() -> None:
    a, b = vector(0), vector(1)
    torch.testing.assert_close((a + 2 * b - a).vector, 2 * b.vector, rtol=1e-5, atol=1e-5)
    assert torch.equal((-a).direction, -a.direction)
    assert (a - b).origin == {"kind": "difference", "of": [a.origin, b.origin]}
    mixed = SteeringVector.from_latents(RUN, {3: 1.0, 5: -2.0})
    torch.testing.assert_close(mixed.vector, (RUN.sae.W_dec[3] - 2 * RUN.sae.W_dec[5]).detach())
    minus = SteeringVector.from_latent(RUN, 3, pole=-1)
    torch.testing.assert_close(minus.vector, -RUN.sae.W_dec[3].detach())
    with pytest.raises(UserError, match="two interventions"):
        a + vector(0, "blocks.0.hook_resid_post")
    with pytest.raises(UserError, match="no direction"):
        a - a
    assert a.with_units(max_activation=5.0).length("-0.8max") == -4.0
    assert a.with_units(max_activation=5.0).length("3x") == 15.0
    assert (2 * a.with_units(max_activation=5.0, rms_norm=3.0)).length("1max") == 5.0
    reversed_one = -a.with_units(max_activation=5.0, rms_norm=3.0)
    assert reversed_one.length("1norm") == 3.0
    with pytest.raises(UserError, match="the vector was reversed, and has none that way; reverse the strength"):
        reversed_one.length("1max")
    assert reversed_one.with_units(max_activation=4.0).length("1max") == 4.0


def test_effects_match_their_definitions_prompt_by_prompt() -> None:
    concept, add = [7, 20, 33], Add(vector(), 5.0)
    effects = UnsteeredBaseline(llama(), PROMPTS, concept, tokenizer=tokenizer(), batch_size=3).measure(add)
    for row, text in enumerate(PROMPTS):
        p, q = log_probs(text), log_probs(text, add)
        ids = ids_of(text)[0]
        assert float(effects.kl[row]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        ce = -q[:-1].gather(-1, ids[1:, None]).mean()
        assert float(effects.cross_entropy[row]) == pytest.approx(float(ce), rel=1e-3)
        assert float(effects.mass[row]) == pytest.approx(float(q[:, concept].exp().sum(-1).mean()), rel=1e-3)
        shift = q - p
        expected = (shift[:, concept].mean(-1) - shift.mean(-1)).mean()
        assert float(effects.logit_shift[row]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_the_ratio_of_perplexities_is_a_geometric_mean_over_prompts_that_have_one() -> None:
    add, empty = Add(vector(), 5.0), ""  # BOS alone, which nothing follows
    effects = UnsteeredBaseline(llama(), [*PROMPTS, empty], tokenizer=tokenizer(), batch_size=3).measure(add)
    ratios = []
    for text in PROMPTS:
        before, after = (-log_probs(text, i)[:-1].gather(-1, ids_of(text)[0][1:, None]).mean() for i in ((), add))
        ratios.append(math.exp(float(after - before)))
    assert effects.perplexity_ratio == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-3)
    assert effects.perplexity_ratio != pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    alone = UnsteeredBaseline(llama(), [empty], tokenizer=tokenizer()).measure(add)
    with pytest.raises(UserError, match="a prompt of one token has no perplexity"):
        _ = alone.perplexity_ratio


def test_doing_nothing_costs_nothing() -> None:
    effects = UnsteeredBaseline(llama(), PROMPTS, [7], tokenizer=tokenizer()).measure(Add(vector(), 0.0))
    assert effects.kl.tolist() == [0.0] * len(PROMPTS)
    assert effects.perplexity_ratio == 1.0
    assert effects.logit_shift.tolist() == [0.0] * len(PROMPTS)


@pytest.mark.parametrize("budget", [{"budget_kl": 0.2}, {"budget_perplexity": 1.3}])
def test_calibration_spends_the_budget_and_no_more(budget: dict[str, float]) -> None:
    # Text of the model's own: on any other an untrained model's perplexity may well fall.
    texts = [f"{p} {generate(llama(), p, tokenizer=tokenizer(), max_new_tokens=12)}" for p in PROMPTS]
    found = calibrate(llama(), vector(), texts, tokenizer=tokenizer(), **budget)
    assert found.reached
    effects = UnsteeredBaseline(llama(), texts, tokenizer=tokenizer())

    def damage(strength: float) -> float:
        measured = effects.measure(Add(vector(), strength))
        return measured.mean_kl if "budget_kl" in budget else measured.perplexity_ratio

    limit = next(iter(budget.values()))
    assert damage(found.strength) == pytest.approx(found.damage) and found.damage <= limit
    assert damage(found.strength * 1.05) > limit


def test_calibration_says_when_the_budget_cannot_be_spent() -> None:
    found = calibrate(llama(), lambda s: Scale(RUN, 3, 1 + s), PROMPTS, budget_kl=50, limit=2.0, tokenizer=tokenizer())
    assert not found.reached and found.strength == 2.0
    with pytest.raises(UserError, match="needs limit"):
        calibrate(llama(), lambda s: Scale(RUN, 3, s), PROMPTS, budget_kl=1, tokenizer=tokenizer())
    with pytest.raises(UserError, match="one budget"):
        calibrate(llama(), vector(), PROMPTS, tokenizer=tokenizer())
    with pytest.raises(UserError, match=r"0\.5 is not a finite number above 1, the damage"):
        calibrate(llama(), vector(), PROMPTS, budget_perplexity=0.5, tokenizer=tokenizer())


def planted() -> SteeringVector:
    """The direction that raises the concept most: the unembedding's own rows."""
    rows = llama().lm_head.weight.detach()
    return SteeringVector.from_tensor(rows[[7, 20]].mean(0) - rows.mean(0), "blocks.2.hook_resid_post", rms_norm=10.0)


def test_dose_response_tells_a_direction_that_works_from_one_that_does_not() -> None:
    options = {"strengths": [1, 3, 6, 10], "tokenizer": tokenizer(), "kl_budget": 0.3, "max_new_tokens": 6}
    texts = {"positive": POSITIVE, "negative": NEGATIVE}
    targets, neutral = [*PROMPTS, *POSITIVE], [*PROMPTS, *NEGATIVE]
    good = dose_response(llama(), planted(), targets, neutral, [7, 20], **texts, **options)
    assert "better than difference of means" in good.verdict
    assert "better than random directions" in good.verdict
    poor = dose_response(llama(), -planted(), targets, neutral, [7, 20], **texts, **options)
    assert "worse than random directions" in poor.verdict
    doses = good.of("vector")
    assert [d.strength for d in doses] == [1, 3, 6, 10]
    assert all(a.logit_shift < b.logit_shift for a, b in itertools.pairwise(doses))
    assert {d.direction for d in good.doses} == {"vector", "difference of means", *(f"random {i}" for i in range(4))}
    assert all(d.repetition is not None for d in good.doses)
    single = UnsteeredBaseline(llama(), targets, [7, 20], tokenizer=tokenizer()).measure(Add(planted(), 3))
    assert doses[1].logit_shift == pytest.approx(float(single.logit_shift.mean()))


def test_an_equal_direction_is_not_distinguishable() -> None:
    found = dose_response(
        llama(), random_direction(planted(), 11), PROMPTS, PROMPTS, [7, 20], tokenizer=tokenizer(), n_random=6
    )
    assert [c.verdict for c in found.contrasts] == ["not distinguishable from random directions"]


def test_one_prompt_gives_no_verdict_on_a_difference_of_means() -> None:
    """Resampled it is itself: the interval would have no width, and any difference would count."""
    texts = {"positive": POSITIVE, "negative": NEGATIVE}
    found = dose_response(
        llama(), planted(), PROMPTS[:1], [*PROMPTS, *NEGATIVE], [7, 20], **texts, tokenizer=tokenizer(), kl_budget=0.3
    )
    means, drawn = found.contrasts
    assert means.verdict == "not to be judged against difference of means on one prompt"
    assert math.isnan(means.low) and math.isfinite(means.difference) and math.isfinite(drawn.low)


def test_curves_are_compared_at_equal_damage() -> None:
    curve = Curve(effect=np.array([[1.0], [2.0]]), kl=np.array([[0.5], [1.5]]))
    one = np.ones((1, 1))
    assert curve.at(0.25, one, one)[0] == pytest.approx(0.5)
    assert curve.at(1.0, one, one)[0] == pytest.approx(1.5)


def test_effect_size_and_both_ways() -> None:
    found = effect_size(llama(), RUN, [3, 5, 9], PROMPTS, 4.0, tokenizer=tokenizer())
    baseline = UnsteeredBaseline(llama(), PROMPTS, tokenizer=tokenizer())
    assert found.kl[1] == baseline.measure(Add(SteeringVector.from_latent(RUN, 5), 4.0)).mean_kl
    assert found.low <= found.mean <= found.high
    both = two_way(llama(), planted_run(), 0, PROMPTS, [7], [20], 4.0, tokenizer=tokenizer())
    assert both.verdict == "both ways"
    none = two_way(llama(), planted_run(), 0, PROMPTS, [20], [7], 4.0, tokenizer=tokenizer())
    assert none.verdict == "neither way"


def planted_run():
    """An SAE whose latent 0 promotes token 7 on its plus side and token 20 on its minus side."""
    from saelab.sae import build
    from saelab.steering import Run

    rows = llama().lm_head.weight.detach()
    sae = build("topk", d_in=32, d_sae=16, k=4)
    with torch.no_grad():
        sae.W_dec[0] = (rows[7] - rows[20]) / (rows[7] - rows[20]).norm()
    return Run(sae.eval(), "blocks.2.hook_resid_post")


@pytest.mark.parametrize(
    "intervention",
    [Add(SteeringVector.from_latent(RUN, 11), 4.0), Clamp(RUN, 11, 6.0, where="generated"), Add(vector(), 4.0)],
    ids=["latent", "clamp", "direction"],
)
def test_an_attribution_adds_up(intervention) -> None:
    rows = attribute_logits(
        llama(), "w5 w6 w70 w8", intervention, RUN, max_new_tokens=4, tokenizer=tokenizer(), steps=64, top=64
    )
    assert len(rows) == 4
    for row in rows:
        parts = row.steered + row.other_latents + row.error_term + row.gap
        assert parts == pytest.approx(row.change, abs=1e-3)
        # 64 midpoint steps on a smooth path.
        assert abs(row.gap) < 0.02 * max(1.0, abs(row.change))
        assert sum(m.contribution for m in row.top_latents) == pytest.approx(row.other_latents, abs=1e-3)
        assert not (row.steered and intervention == Add(vector(), 4.0))
    if not isinstance(intervention, Clamp):
        assert any(abs(row.earlier_positions) > 1e-4 for row in rows)


def test_an_attribution_matches_finite_differences() -> None:
    """A small push: the logit's change is its gradient times the push."""
    row = attribute_logits(
        llama(), "w5 w6 w70", Add(vector(), 1e-2), RUN, max_new_tokens=1, tokenizer=tokenizer(), steps=2
    )[0]
    before, after = (log_probs("w5 w6 w70", i)[-1] for i in ((), Add(vector(), 1e-2)))
    change = (after - after.mean() - before + before.mean())[row.token]
    assert row.change == pytest.approx(float(change), rel=1e-2)
    assert row.gap == pytest.approx(0, abs=2e-4)


def test_latents_of_every_kind_of_intervention_count_as_steered() -> None:
    made = [
        Add(SteeringVector.from_latent(RUN, 3) - 2 * SteeringVector.from_latent(RUN, 5), 1.0),
        ProjectOut([SteeringVector.from_latent(RUN, 7), SteeringVector.from_latents(RUN, {9: 1.0, 11: 1.0}), vector()]),
        Clamp(RUN, 13, 1.0),
    ]
    assert named_latents(made) == {3, 5, 7, 9, 11, 13}


def test_concepts_and_repetition() -> None:
    assert concept_tokens(tokenizer(), ["w7", "w20"]).tolist() == [7, 20]
    with pytest.raises(UserError, match="list of words"):
        concept_tokens(tokenizer(), "w7")
    assert repetition([1, 2, 3, 1, 2, 3, 1, 2, 3]) == pytest.approx(4 / 7)
    assert repetition([1, 2]) == 0
    assert math.isclose(repetition(list(range(10))), 0)

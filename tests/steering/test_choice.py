"""Rows of a batch steered differently, strengths at one damage, and latents chosen by what they write."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab import UserError
from saelab.cli import main
from saelab.features import FeatureIndex
from saelab.features.output_score import output_scores
from saelab.lm.tokens import tokenize
from saelab.runs import Run
from saelab.sae import build
from saelab.shipped import checkpoints
from saelab.steering import Add, Clamp, Scale, SteeringVector, calibrate
from saelab.steering.choice import input_scores, rank_latents, slope, word_tokens
from saelab.steering.evaluation.concepts import (
    Concept,
    find_concept,
    read_concepts,
    read_instructions,
    shipped_concepts,
    shipped_instructions,
)
from saelab.steering.generation import generate, generate_tokens
from saelab.steering.measure.budget import strengths_at
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.rows import on_rows
from tests import tiny_lm
from tests.steering.models import D_MODEL, HOOK, llama, tokenizer

PROMPTS = ["w5 w6 w70", "w8 w9 w11 w12 w13 w20", "w30", "w41 w42 w43"]


@cache
def planted() -> Run:
    """An SAE whose latent 5 points where w10 becomes likelier, while latent 7 fires on w50 and writes nothing."""
    torch.manual_seed(0)
    sae = build("relu", d_in=D_MODEL, d_sae=24).eval()
    baseline = UnsteeredBaseline(llama(), PROMPTS, ["w10"], tokenizer=tokenizer())
    up = slope(llama(), HOOK, baseline)
    with torch.no_grad():
        rows = torch.randn(24, D_MODEL)
        rows -= torch.outer(rows @ up, up) / up.square().sum()  # no other latent moves w10, to first order
        rows[5] = up
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    return Run(sae, HOOK)


def family(name: str, folder: Path) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = getattr(tiny_lm, f"save_{name}")(folder / name)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return model, AutoTokenizer.from_pretrained(path), "blocks.1.hook_resid_post"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3"])
def test_rows_of_a_batch_are_steered_as_if_each_was_alone(name: str, tmp_path: Path) -> None:
    model, words, hook = family(name, tmp_path)
    torch.manual_seed(1)
    run = Run(build("topk", d_in=16, d_sae=32, k=8).eval(), hook)
    vector = SteeringVector.from_tensor(torch.randn(16), hook)
    texts = ["the cat sat", "rain fell over old roofs and", "seven ships", "a", "the quiet harbour at dawn"]
    steered = [
        [Add(vector, 3.0)],
        [Add(vector, -6.0, where="generated")],
        [Clamp(run, 3, 4.0)],
        [Clamp(run, 3, -9.0)],
        [],
    ]
    ids, mask = tokenize(words, texts)
    own = [i for row, group in enumerate(steered) if group for i in on_rows(group, [row])]
    found = generate_tokens(model, ids, mask, own, max_new_tokens=8)
    for row, group in enumerate(steered):
        alone_ids, _ = tokenize(words, texts[row])
        assert found[row] == generate_tokens(model, alone_ids, None, group, max_new_tokens=8)[0], f"row {row}"
    assert found != generate_tokens(model, ids, mask, max_new_tokens=8)


def test_two_edits_of_one_latent_conflict_unless_their_rows_differ() -> None:
    run, ids = planted(), torch.tensor([[1, 5, 6], [1, 7, 8]])
    for rows in ([0], [1]):
        generate_tokens(llama(), ids, None, on_rows(Clamp(run, 3, 1.0), [0]) + on_rows(Scale(run, 3, 2.0), rows)
                        if rows == [1] else on_rows(Clamp(run, 3, 1.0), rows), max_new_tokens=1)  # fmt: skip
    with pytest.raises(UserError, match="conflict"):
        both = on_rows(Clamp(run, 3, 1.0), [0]) + on_rows(Scale(run, 3, 2.0), [0, 1])
        generate_tokens(llama(), ids, None, both, max_new_tokens=1)
    with pytest.raises(UserError, match="at least one row"):
        on_rows(Clamp(run, 3, 1.0), [])


def test_many_measured_at_once_are_what_each_is_alone() -> None:
    baseline = UnsteeredBaseline(llama(), PROMPTS, ["w10"], tokenizer=tokenizer(), batch_size=3)
    steered = [[Add(SteeringVector.from_latent(planted(), i), 2.0)] for i in range(5)] + [[Clamp(planted(), 5, 3.0)]]
    for rows in (1, 7, 100):
        for found, group in zip(baseline.measure_many(steered, rows), steered):
            alone = baseline.measure(group)
            for name in ("kl", "cross_entropy", "mass", "logit_shift"):
                torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("unit", "budget"), [("kl", 0.05), ("kl", 0.5), ("perplexity", 1.3)])
def test_strengths_at_a_budget_are_those_that_bisection_finds(unit: str, budget: float) -> None:
    # The model's own texts: on others a random model's perplexity may fall.
    texts = [f"{p} {generate(llama(), p, tokenizer=tokenizer(), max_new_tokens=12)}" for p in PROMPTS]
    baseline = UnsteeredBaseline(llama(), texts, tokenizer=tokenizer())
    vectors = [SteeringVector.from_latent(planted(), i) for i in (2, 5, 9)]
    found = strengths_at(
        baseline, [lambda s, v=v: [Add(v, s)] for v in vectors], budget, 1.0, unit=unit, tolerance=0.02
    )
    for vector, at in zip(vectors, found):
        by_bisection = calibrate(llama(), vector, texts, tokenizer=tokenizer(), limit=100.0, tolerance=0.005,
                                 **{f"budget_{unit}": budget})  # fmt: skip
        assert at.reached and at.damage == pytest.approx(budget, rel=0.021)
        again = baseline.measure(Add(vector, at.strength))
        assert at.damage == pytest.approx(again.mean_kl if unit == "kl" else again.perplexity_ratio, rel=1e-3)
        if unit == "kl":
            assert at.strength == pytest.approx(by_bisection.strength, rel=0.05)


def test_a_budget_that_is_not_reached_says_so() -> None:
    baseline = UnsteeredBaseline(llama(), PROMPTS, tokenizer=tokenizer())
    vector = SteeringVector.from_latent(planted(), 2)
    (at,) = strengths_at(baseline, [lambda s: [Add(vector, s)]], 5.0, 0.1, limit=0.5)
    assert at.strength == 0.5 and at.damage < 5.0 and not at.reached
    (idle,) = strengths_at(baseline, [lambda s: []], 0.3, 0.1, rounds=4)  # does nothing at any strength
    assert idle.damage == pytest.approx(0.0, abs=1e-6) and not idle.reached
    with pytest.raises(UserError, match="above 1"):
        strengths_at(baseline, [lambda s: []], 0.9, 0.1, unit="perplexity")


def test_the_slope_is_the_derivative_of_the_log_probability() -> None:
    torch.manual_seed(3)
    model = llama()
    baseline = UnsteeredBaseline(model, PROMPTS, ["w10", "w11"], tokenizer=tokenizer())
    gradient = slope(model, HOOK, baseline)
    for _ in range(3):
        direction = torch.randn(D_MODEL)
        vector, step = SteeringVector.from_tensor(direction, HOOK), 0.02
        up, down = (float(baseline.measure(Add(vector, s)).mass.mean()) for s in (step, -step))
        slope_by_difference = (math.log(up) - math.log(down)) / (2 * step)
        assert float(gradient @ vector.direction) == pytest.approx(slope_by_difference, rel=0.02, abs=2e-3)


def test_the_latent_that_writes_is_chosen_and_not_the_one_that_reads() -> None:
    concept = Concept("ten", ("w10",))
    ranking = rank_latents(llama(), planted(), concept, PROMPTS, candidates=8, tokenizer=tokenizer())
    assert ranking.best.latent == 5 and ranking.best.pole == 1 and ranking.best.times > 1
    assert ranking.best.effect > max(ranking.controls)
    assert [c.effect for c in ranking.candidates] == sorted((c.effect for c in ranking.candidates), reverse=True)
    assert len({(c.latent, c.pole) for c in ranking.candidates}) == 8
    assert ranking.best.input_score is None and "latent 5 multiplies the probability of 'ten'" in ranking.reason
    json.dumps(ranking.content(), allow_nan=False)
    with pytest.raises(UserError, match="at least 1"):
        rank_latents(llama(), planted(), concept, PROMPTS, candidates=0, tokenizer=tokenizer())


def test_a_signed_latent_is_chosen_by_the_pole_that_writes() -> None:
    sae = build("abs_topk", d_in=D_MODEL, d_sae=24, k=6).eval()
    with torch.no_grad():
        rows = planted().sae.W_dec.clone()
        rows[5] *= -1
        sae.W_dec.copy_(rows)
    ranking = rank_latents(llama(), Run(sae, HOOK), Concept("ten", ("w10",)), PROMPTS, tokenizer=tokenizer())
    assert (ranking.best.latent, ranking.best.pole) == (5, -1) and "latent 5 −" in ranking.reason


def test_input_scores_are_those_of_a_loop() -> None:
    torch.manual_seed(2)
    run = Run(build("abs_topk", d_in=D_MODEL, d_sae=24, k=6).eval(), HOOK)
    concept = Concept("c", ("w10",), ("w5 w6 w7", "w5 w8"), ("w20 w21", "w22 w23 w24"))
    found = input_scores(llama(), run, concept, tokenizer())
    magnitudes = []
    for text in (*concept.positive, *concept.negative):
        seen: list[Any] = []
        handle = llama().model.layers[1].register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        ids, _ = tokenize(tokenizer(), text)
        with torch.no_grad():
            llama()(input_ids=ids)
        handle.remove()
        hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        dense = run.sae.encode(hidden.reshape(-1, D_MODEL)[1:]).dense().detach().double()
        magnitudes.append([dense.clamp(min=0).mean(0), (-dense).clamp(min=0).mean(0)])
    for slot in range(48):
        m = [float(parts[slot // 24][slot % 24]) for parts in magnitudes]
        rms = math.sqrt((m[0] ** 2 + m[1] ** 2) / 2) + math.sqrt((m[2] ** 2 + m[3] ** 2) / 2)
        expected = ((m[0] + m[1]) / 2 - (m[2] + m[3]) / 2) / rms if rms else 0.0
        assert float(found.score[slot]) == pytest.approx(expected, abs=1e-5)
        assert int(found.fires[0][slot]) == sum(value > 0 for value in m[:2])


def test_models_of_one_name_have_output_scores_of_their_own() -> None:
    from saelab.steering.choice import _output

    run, tokens = planted(), torch.tensor([10, 11])
    other = copy.deepcopy(llama())
    with torch.no_grad():
        other.get_output_embeddings().weight.neg_()
    first, second = _output(llama(), run, tokens), _output(other, run, tokens)
    assert first is not None and second is not None and not torch.equal(first, second)
    assert torch.equal(second, _output(other, Run(copy.deepcopy(run.sae), HOOK), tokens))
    assert torch.equal(first, _output(llama(), run, tokens))


def test_output_scores_are_shares_of_the_promoted_logits() -> None:
    index = FeatureIndex(checkpoints() / "abs_topk")
    words = ["music", "song", "piano", "war", "government"]
    table = output_scores(index, words)
    assert len(table) == len(index.table()) and (table["output_score"] > 0).sum() > 0
    strongest = table[table["output_score"] > 0].sort_values("output_score", ascending=False).head(5)
    for latent, pole, score in strongest.itertuples(index=False):
        row = index.latent(int(latent), int(pole))
        pairs = list(zip(row["promoted"], row["promoted_logits"]))
        hits = [v for t, v in pairs if any(w.startswith(t.strip().lower()) for w in words)]
        assert hits and score <= sum(hits) / sum(row["promoted_logits"]) + 1e-6
    exact = index.latent(int(strongest.iloc[0]["latent"]), int(strongest.iloc[0]["pole"]))
    one = next(t.strip().lower() for t in exact["promoted"] if t.strip().lower() in words)
    only = output_scores(index, [one])
    row = only[(only["latent"] == exact["latent"]) & (only["pole"] == exact["pole"])].iloc[0]
    expected = sum(v for t, v in zip(exact["promoted"], exact["promoted_logits"]) if t.strip().lower() == one)
    assert row["output_score"] == pytest.approx(expected / sum(exact["promoted_logits"]), rel=1e-5)
    with pytest.raises(UserError, match="at least one word"):
        output_scores(index, [" "])


def test_a_concept_counts_words_that_are_one_token() -> None:
    found = word_tokens(tokenizer(), ["w10", "w11"]).tolist()
    assert [tokenizer().decode([t]) for t in found] == ["w10", "w11"]


def test_the_shipped_sets_are_whole() -> None:
    concepts, instructions = shipped_concepts(), shipped_instructions()
    assert len(concepts) == 30 and len(instructions) == 50
    texts = [text for c in concepts for text in (*c.positive, *c.negative)]
    assert len(set(texts)) >= len(texts) - 2  # pairs differ; hardly a sentence is used twice
    for concept in concepts:
        assert len(concept.positive) == len(concept.negative) == 10 and len(concept.words) == 8
        read, judge = concept.halves()
        assert not set(read.positive) & set(judge.positive) and len(read.positive) == 5
        for instruction in instructions:
            assert not {w.lower() for w in concept.words} & set(instruction.lower().strip(".?").split())
    assert find_concept("sea").name == "the sea" and find_concept("oak, beech").words == ("oak", "beech")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "damaged"),
        ("{}", "damaged"),
        ("[]", "no concept"),
        ('[{"name": "a", "words": ["b"]}, {"name": "a", "words": ["c"]}]', "twice"),
        ('[{"name": "a"}]', "neither words nor texts"),
        ('[{"name": "", "words": ["b"]}]', "no name"),
        ('[{"name": "a", "words": "sea"}]', "not a list of texts"),
        ('[{"name": 3, "words": ["b"]}]', "name of a concept is 3"),
        ('[{"name": "a", "positive": ["b"]}]', "one sort only"),
        ('[{"name": "a", "wrods": ["b"]}]', "wrods"),
    ],
)
def test_a_file_of_concepts_that_is_wrong_is_refused_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "concepts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_concepts(path)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_are_not_called_damaged(tmp_path: Path) -> None:
    for read in (read_concepts, read_instructions):
        with pytest.raises(UserError, match=r"nowhere cannot be read \(No such file or directory\)"):
            read(tmp_path / "nowhere")


def test_contrast_texts_give_the_words_where_none_are_named(tmp_path: Path) -> None:
    concept = Concept("ships", (), ("Ships sail far", "Ships sink"), ("Cars drive far", "Cars stop"))
    assert concept.vocabulary[0] == "ships" and "far" not in concept.vocabulary
    with pytest.raises(UserError, match="two of each"):
        Concept("one", ("w",), ("a text",), ("another",)).halves()
    with pytest.raises(UserError, match="no instruction"):
        read_instructions(_file(tmp_path / "i.txt", "# nothing\n\n"))


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_search_ranks_by_what_latents_promote(capsys: Any) -> None:
    main(
        [
            "find",
            "music song piano war government",
            str(checkpoints() / "abs_topk"),
            "--writes",
            "--json",
            "--count",
            "3",
        ]
    )
    found = json.loads(capsys.readouterr().out)
    table = output_scores(FeatureIndex(checkpoints() / "abs_topk"), ["music", "song", "piano", "war", "government"])
    best = table.sort_values("output_score", ascending=False, kind="stable").iloc[0]
    assert (found[0]["latent"], found[0]["pole"]) == (best["latent"], best["pole"]) and found[0]["output_score"] > 0
    with pytest.raises(SystemExit):
        main(["find", "12", str(checkpoints() / "abs_topk"), "--writes"])
    assert "--writes takes words" in " ".join(capsys.readouterr().err.split())

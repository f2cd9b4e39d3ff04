"""What the pages compute: search, the contest for a token, health, matching, poles, notes, export."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from saelab import viz
from saelab.comparison import matching_poles
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features import FeatureIndex, search
from saelab.prompt import contest as why
from saelab.sae import VARIANTS, LinearSAE, build
from saelab.workspace import Workspace
from saelab.workspace.notes import read_notes, write_note

D_IN, D_SAE = 12, 30


def test_search_by_text_is_literal_and_ignores_case(folder: Path) -> None:
    table = search.catalogue(FeatureIndex(folder / "runs" / "topk"))
    found = search.find(table, "RIVER", "fires on")
    index = FeatureIndex(folder / "runs" / "topk")
    expected = [j for j in range(48) if any("river" in t for t in index.latent(j)["top_tokens"])]
    assert found["latent"].tolist() == expected and expected
    assert len(search.find(table, "**bold**", "fires on")) > 0  # no pattern, whatever it looks like
    assert len(search.find(table, "  ")) == len(table)


def test_narrow_keeps_what_was_asked_for(folder: Path) -> None:
    table = search.catalogue(FeatureIndex(folder / "runs" / "abs_topk"))
    assert set(search.narrow(table, pole=-1)["pole"]) == {-1}
    assert (search.narrow(table, state="dead")["count"] == 0).all()
    low, high = 0.03, 0.06
    kept = search.narrow(table, density=(low, high), entropy=(0.0, 4.0))
    assert len(kept) == sum(low <= d <= high and e <= 4 for d, e in zip(table["density"], table["token_entropy"]))


def test_marks_are_cut_out_and_found_again() -> None:
    text, spans = search.marked("The [[old mill]] and [[rain]]")
    assert text == "The old mill and rain"
    assert [text[a:b] for a, b in spans] == ["old mill", "rain"]
    strings = ["<bos>", "The", " old", " mill", " and", " ra", "in"]
    assert search.tokens_in(strings, spans, offset=1) == [False, False, True, True, False, True, True]
    assert search.marked("all of it")[1] == [(0, 9)]
    with pytest.raises(UserError, match="empty"):
        search.marked(" ")


@pytest.mark.parametrize("variant", [v for v, cls in VARIANTS.items() if issubclass(cls, LinearSAE)])
def test_the_contest_names_the_winners_and_a_margin_that_decides(folder: Path, variant: str) -> None:
    sae = Workspace.scan(folder).run(f"runs/{variant}").sae
    x = next(ActivationCache(folder / "cache").batches(64, split="held_out", seed=None)).acts
    for row in x[:5]:
        found = why.contest(sae, row, losers=48)
        code = sae.encode(row[None]).nonzero()
        assert {c.latent: c.activation for c in found.winners} == pytest.approx(
            dict(zip(code.indices.tolist(), code.values.tolist()))
        )
        assert len(found.winners) + len(found.losers) == sae.d_sae
        assert all(c.margin >= 0 for c in found.winners)
        if variant != "gated":  # there the gate decides, and the magnitude may still be zero
            assert all(c.margin <= 0 for c in found.losers)


def test_the_margin_of_topk_is_what_it_takes_to_lose() -> None:
    sae = build("topk", D_IN, D_SAE, k=3).eval()
    x = torch.randn(D_IN)
    found = why.contest(sae, x)
    weakest, strongest_loser = found.winners[-1], found.losers[0]
    assert weakest.margin == pytest.approx(weakest.score - strongest_loser.score)
    with torch.no_grad():
        sae.b_enc[weakest.latent] -= weakest.margin * 1.001
    assert weakest.latent not in {c.latent for c in why.contest(sae, x).winners}


@pytest.mark.parametrize("variant", ["jump_relu", "feature_choice"])
def test_with_thresholds_of_their_own_the_nearest_losers_are_named(variant: str) -> None:
    sae = build(variant, D_IN, D_SAE, **({"k": 4} if variant == "feature_choice" else {})).eval()
    with torch.no_grad():
        cuts = torch.rand(D_SAE) * 3 + 0.05
        if variant == "jump_relu":
            sae.threshold.copy_(cuts)
        else:
            sae.choose(0)
            sae.latent_threshold.set_(cuts)
    x = torch.randn(D_IN)
    near, everyone = (why.contest(sae, x, losers=losers) for losers in (4, D_SAE))
    contenders = [*everyone.winners, *everyone.losers]
    assert everyone.cut is None and len(contenders) == D_SAE
    for c in contenders:
        assert c.score - c.margin == pytest.approx(float(cuts[c.latent]), rel=1e-4)
    nearest = sorted(everyone.losers, key=lambda c: -c.margin)[:4]
    assert [c.latent for c in near.losers] == [c.latent for c in nearest]
    assert near.losers != sorted(everyone.losers, key=lambda c: -c.score)[:4], "or nothing was tested"


def test_a_selection_by_gradients_is_explained_by_its_own_score() -> None:
    sae = build("gradient_topk", D_IN, D_SAE, k=3, beta=4.0, grad_norm="none", grad_select="train_and_eval").eval()
    x, grad = torch.randn(D_IN), torch.randn(D_IN)
    found = why.contest(sae, x, grad, losers=D_SAE)
    assert "gradient" in found.score
    assert min(c.score for c in found.winners) >= max(c.score for c in found.losers)
    assert all(c.margin >= 0 for c in found.winners) and all(c.margin <= 0 for c in found.losers)
    # By pre-activations alone the winners would be others, so the score above is what decided.
    largest = sae.pre_acts(x[None], slice(0, D_SAE))[0].topk(3).indices.tolist()
    assert {c.latent for c in found.winners} != set(largest)


def test_effects_predict_the_change_of_a_linear_loss() -> None:
    sae = build("topk", D_IN, D_SAE, k=6).eval()
    x, grad = torch.randn(D_IN), torch.randn(D_IN)
    recon, W_dec = sae(x[None])[0].detach(), sae.W_dec.detach()
    for effect in why.effects(sae, x, grad):
        without = recon - effect.activation * W_dec[effect.latent]
        assert float(grad @ (recon - without)) == pytest.approx(effect.effect, abs=1e-5)
    made = [why.Effect(j, a, 0.0, e) for j, (a, e) in enumerate([(9, 0.0), (8, 1.0), (1, 5.0), (2, 0.5)])]
    inert, causal = why.inert_and_causal(made)
    assert [e.latent for e in inert] == [0] and [e.latent for e in causal] == [2]


def test_the_replay_is_the_pursuit() -> None:
    sae = build("matching_pursuit", D_IN, D_SAE, n_steps=9).eval()
    with torch.no_grad():
        sae.b_dec.normal_()
    for x in torch.randn(4, D_IN):
        steps, start = sae.replay(x)
        assert start == pytest.approx(float((x - sae.b_dec.detach()).norm()), rel=1e-5)
        norms = [start, *(s.residual_norm for s in steps)]
        assert all(b <= a for a, b in zip(norms, norms[1:]))  # noqa: RUF007
        dense = torch.zeros(D_SAE)
        for step in steps:
            dense[step.latent] += step.coefficient
            assert step.runner_up_product <= step.coefficient and step.runner_up != step.latent
        torch.testing.assert_close(dense, sae.encode(x[None]).dense()[0].detach(), rtol=1e-4, atol=1e-5)


def test_notes_of_two_writers_are_both_kept(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_note, args=(tmp_path, j, f"label {j}")) for j in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_notes(tmp_path)) == 12
    write_note(tmp_path, 3, " ", "")
    assert 3 not in read_notes(tmp_path)
    (tmp_path / "notes.json").write_text("[1]")
    with pytest.raises(UserError, match="notes"):
        read_notes(tmp_path)


def test_an_exported_latent_is_inert_and_complete(folder: Path) -> None:
    index = FeatureIndex(folder / "runs" / "abs_topk")
    rows = {p: index.latent(3, p) for p in (1, -1)}
    examples = {p: index.examples(3, p) for p in (1, -1)}
    page = viz.latent_page("<script>x</script>", rows, examples)
    assert "<script" not in page and "<img" not in page and "Content-Security-Policy" in page
    data = json.loads(viz.latent_json(rows, examples, run="x"))
    assert [p["pole"] for p in data["poles"]] == [1, -1]
    assert len(data["poles"][0]["examples"]) == len(examples[1])


def test_states_count_latents_not_poles(folder: Path) -> None:
    table = search.catalogue(FeatureIndex(folder / "runs" / "abs_topk"))
    table.loc[table["latent"] == 3, ["count", "density"]] = 0
    table.loc[table["latent"] == 4, "count"] = [4, 0]
    table.loc[table["latent"] == 5, "density"] = [0.3, 0.3]  # dense on each side, ultra-dense together
    table.loc[~table["latent"].isin([3, 4, 5]), "density"] = 0.01
    table.loc[~table["latent"].isin([3, 4, 5]), "count"] = 10
    table.loc[table["latent"] == 4, "density"] = 1e-4
    assert search.count_states(table) == {"dead": 1, "dying": 1, "dense": 1, "ultra-dense": 1}


def test_a_counterpart_is_the_closest_row_of_each_other_sae() -> None:
    sae, other = (build("topk", D_IN, D_SAE, k=3) for _ in range(2))
    with torch.no_grad():
        other.W_dec[7] = -2 * sae.W_dec[4]
        other.W_dec[9] = sae.W_dec[4] + 0.1 * torch.randn(D_IN)
    found = search.counterparts(sae.W_dec[4], {"a": other})
    assert found["a"][0] == 9 and found["a"][1] > 0.9
    latent, cosine = search.counterparts(sae.W_dec[4], {"a": other}, signed=True)["a"]
    assert latent == 7 and cosine == pytest.approx(-1, abs=1e-5)


def test_the_poles_of_a_pair_point_the_same_way() -> None:
    cosines = [0.9, -0.9]
    for signed, expected in {
        (False, False): ([1, 1], [1, 1]),
        (True, False): ([1, -1], [1, 1]),  # the right has no negative pole, so the left's is the one that matches
        (False, True): ([1, 1], [1, -1]),
        (True, True): ([1, 1], [1, -1]),
    }.items():
        assert tuple(side.tolist() for side in matching_poles(cosines, signed)) == expected

"""Probing and causal tasks on planted concepts whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate, saebench_json
from saelab.evaluation.tasks import battery, probe_sets
from saelab.evaluation.tasks.absorption import absorbed, absorption, first_words, l1_probe, split_latents
from saelab.evaluation.tasks.passages import Passages, Pooled, from_cache, from_texts, pool, read_jsonl
from saelab.evaluation.tasks.probing import Standardised, sparse_probing, tasks
from saelab.evaluation.tasks.scr_tpp import ablate, scr, tpp
from saelab.evaluation.tasks.two_sided import Firings, collect, jensen_shannon, opposite_pairs, two_sidedness
from saelab.features import LogitLens
from saelab.lm import Site
from saelab.lm.unembed import Unembedding
from saelab.sae import build
from saelab.sae.normalised import Normalised
from saelab.sae.weights import save

D, N = 16, 240


def planted_sae(d=D, signed=False):
    """An SAE whose latents are the axes; with ``signed`` each keeps both signs."""
    sae = build("abs_topk" if signed else "topk", d_in=d, d_sae=d, k=d).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(d))
        sae.W_enc.copy_(torch.eye(d))
        sae.b_dec.zero_()
    return sae


def passages(a, b=None, noise=0.05, tokens=4):
    """Axis 0 carries concept a, axes 1 and 2 concept b and its absence; every axis also carries noise."""
    x = 0.5 + noise * torch.randn(len(a), tokens, D)
    x[:, :, 0] += torch.tensor(a)[:, None] * 1.0
    if b is not None:
        x[:, :, 1] += torch.tensor(b)[:, None] * 1.5
        x[:, :, 2] += 1.5 * (1 - torch.tensor(b)[:, None])
    labels = {"a": [str(v) for v in a]} | ({"b": [str(v) for v in b]} if b is not None else {})
    return Passages(x.flatten(0, 1), torch.arange(len(a)).repeat_interleave(tokens), labels, "planted")


def test_the_readout_of_a_layer_norm_subtracts_the_mean_of_a_direction(monkeypatch):
    weight, norm, rows = torch.randn(6, 9), torch.rand(6) + 0.5, torch.randn(4, 6)
    for centred in (True, False):
        monkeypatch.setattr("saelab.lm.unembed.unembedding", lambda _, c=centred: Unembedding(weight, norm, c))
        found = rows @ battery._readout(SimpleNamespace(original_model=None))
        expected = LogitLens(weight, norm, centred).effects(rows)  # less the mean over the vocabulary
        torch.testing.assert_close(found - found.mean(1, keepdim=True), expected)


def test_pooling_commutes_with_decoding():
    sae = build("abs_topk", d_in=D, d_sae=30, k=5).eval()
    data = passages(np.random.default_rng(0).integers(0, 2, 50))
    pooled = pool(sae, data, batch_size=37)
    with torch.no_grad():
        code = sae.encode(data.acts).dense().view(50, 4, 30)
        recon = sae(data.acts).view(50, 4, D).mean(1)
    assert pooled.z.shape == (50, 60)
    assert (pooled.z >= 0).all()
    np.testing.assert_allclose(pooled.latents, code.mean(1).numpy(), atol=1e-5)
    np.testing.assert_allclose(pooled.z @ pooled.directions, (recon - sae.b_dec.detach()).numpy(), atol=1e-5)
    np.testing.assert_allclose(pooled.x, data.acts.view(50, 4, D).mean(1).numpy(), atol=1e-6)
    poles = np.array([3, 33])
    kept = code.clone()
    kept[..., 3] = 0
    error = data.acts.view(50, 4, D) - sae(data.acts).view(50, 4, D)
    want = (kept @ sae.W_dec + sae.b_dec + error).mean(1).detach().numpy()
    np.testing.assert_allclose(ablate(pooled, np.arange(50), poles), want, atol=1e-5)


def test_sparse_probing_finds_the_planted_latent():
    y = np.tile([0, 1], N // 2)
    data = passages(y)
    got = sparse_probing(pool(planted_sae(), data), data, "a")
    for name in ("sae_top_1", "channels_top_1", "dense_probe", "difference_of_means"):
        assert got[f"{name}_test_accuracy"].value == 1.0, name
    assert got["random_direction_test_accuracy"].value < 0.9
    data = passages(y)
    data.acts[:, 0] -= torch.tensor(y).repeat_interleave(4).float()
    got = sparse_probing(pool(planted_sae(), data), data, "a")
    # 60 test passages: chance is 0.5 with a standard error of 0.065
    assert abs(got["sae_top_1_test_accuracy"].value - 0.5) < 0.26


def test_tasks_are_balanced_and_disjoint():
    values = np.array(["x"] * 100 + ["y"] * 60 + ["z"] * 30 + ["rare"] * 3, dtype=object)
    for task in tasks(values):
        assert task.train_y.mean() == 0.5
        assert task.test_y.mean() == 0.5
        assert not set(task.train) & set(task.test)
        assert (values[task.train[task.train_y]] == task.name).all()
    assert [t.name for t in tasks(values)] == ["x", "y", "z"]
    with pytest.raises(UserError, match="two classes"):
        tasks(np.array(["x"] * 50 + ["y"] * 3, dtype=object))


def test_scr_repairs_a_confounded_probe():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    data = passages(a, b, noise=0.3)
    got = scr(pool(planted_sae(), data), a == 1, b == 1, ns=(2, 8))
    assert got["accuracy_clean"] > got["accuracy_before"] + 0.02
    assert got["score"][2] > 0.5  # two latents carry the spurious concept
    assert got["score"][2] > got["score_random_latents"][2]
    assert got["score_difference_of_means"] > 0.3
    with pytest.raises(UserError, match="combination"):
        scr(pool(planted_sae(), data), a == 1, a == 1)


def test_tpp_hits_only_its_own_probe():
    cls = np.tile(np.arange(4), 60)
    x = 0.5 + 0.1 * torch.randn(240, D)
    x[torch.arange(240), torch.from_numpy(cls)] += 1.0
    data = Passages(x, torch.arange(240), {"c": [str(c) for c in cls]}, "planted")
    got = tpp(pool(planted_sae(), data), data, "c", ns=(1, 2))
    assert got["accuracy_before"] > 0.95
    assert got["score"][1] > 0.3
    assert got["score"][1] > 3 * abs(got["score_random_latents"][1])


def test_standardised_probe_reports_weights_in_raw_units():
    x = np.random.default_rng(0).normal(size=(200, 3)) * [1, 10, 100]
    y = x[:, 0] + x[:, 1] / 10 > 0
    probe = Standardised(x, y)
    logits = x @ probe.coef
    assert np.corrcoef(logits, probe.probe.decision_function((x - probe.mean) / probe.sd))[0, 1] > 0.9999


def test_absorption_by_hand():
    direction = np.array([1.0, 0.0, 0.0])
    D_ = np.array([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    cosines = D_ @ direction
    z = np.array([[1.0, 0, 0], [0, 2.0, 0], [0.5, 1.0, 3.0]])
    fraction, full = absorbed(z @ D_, z, cosines, direction, np.array([0]))
    assert full.tolist() == [False, True, False]
    # third word: 0.5 by the main latent and 0.6 by another
    assert fraction.tolist() == pytest.approx([0, 1, 0.6 / 1.1])


def test_absorption_needs_a_model_that_spells():
    words = np.array([f"{c}{i}" for i in range(60) for c in "abcd"])
    acts = 0.1 * torch.randn(240, D)
    with pytest.raises(UserError, match="does not spell"):
        absorption(planted_sae(), acts, words, min_letters=4)
    for i, c in enumerate("abcd"):
        acts[torch.from_numpy(words.astype("U1") == c), i] += 1
    got = absorption(planted_sae(), acts, words, min_letters=4)
    assert got["probe_f1"] > 0.95
    assert got["absorption_fraction"] < 0.05
    assert got["split_latents"] == 1
    assert got["scored_words"] == 60  # those that no probe was fitted on
    with pytest.raises(UserError, match="absorption needs 20"):
        absorption(planted_sae(), acts, words)
    signed = absorption(planted_sae(signed=True), -acts, words, min_letters=4)  # poles, not latents
    assert signed["absorption_fraction"] < 0.05
    assert signed["split_latents"] == 1


def test_a_probe_that_knows_words_by_heart_does_not_spell():
    """Each word has a direction of its own, and five occurrences: divided by occurrence, probes get them right."""
    d = 64
    words = np.array([f"{c}{i}" for i in range(12) for c in "abcd"]).repeat(5)
    acts = torch.randn(48, d).repeat_interleave(5, 0) + 0.05 * torch.randn(240, d)
    with pytest.raises(UserError, match="does not spell"):
        absorption(planted_sae(d), acts, words, min_letters=4)
    alone = np.array([f"{word}-{i}" for i, word in enumerate(words)])  # as if no two were of one word
    assert absorption(planted_sae(d), acts, alone, min_letters=4)["probe_f1"] > 0.9


def test_split_latents_are_those_that_predict_the_letter_by_firing():
    """A latent that is silent on the letter has the largest difference of means, and a negative weight."""
    rng = np.random.default_rng(0)
    y = rng.random(4000) < 0.15
    z = np.zeros((4000, 3))
    z[:, 0] = 5 * ~y  # fires on everything else
    z[:, 1] = y * (rng.random(4000) < 0.95)
    z[:, 2] = rng.random(4000) < 0.3
    train = np.arange(4000) < 3000
    weights = l1_probe(z[train], y[train, None])[0]
    assert weights[0] < 0 < weights[1]
    assert split_latents(z, y, train, weights).tolist() == [1]


def test_whole_latents_stand_beside_poles():
    """Two classes that are the poles of one latent: ablating it hurts both, ablating a pole one of them."""
    cls = np.tile(np.arange(3), 80)
    x = 0.05 * torch.randn(240, D)
    x[torch.from_numpy(cls == 0), 0] += 1
    x[torch.from_numpy(cls == 1), 0] -= 1
    x[torch.from_numpy(cls == 2), 1] += 1
    data = Passages(x, torch.arange(240), {"c": [str(c) for c in cls]}, "planted")
    got = tpp(pool(planted_sae(signed=True), data), data, "c", ns=(1,))
    assert got["score"][1] > got["whole_latents"]["score"][1] + 0.03
    assert "2605.18229" in got["warning"]
    files = saebench_json.task_metrics("tpp", {"c": got})[1]["tpp_metrics"]
    assert files["tpp_threshold_1_total_metric"] == got["whole_latents"]["score"][1]


def test_first_words_are_word_starts_only(tmp_path):
    strings = [" apple", " Bear", "ing", " a", " 12", " über", " Apple"]
    tokens = torch.tensor([[0, 1, 2, 3], [6, 0, 4, 5]])
    cache = ActivationCache.from_tensors(tmp_path / "c", torch.randn(2, 4, 3), tokens)
    acts, words = first_words(cache, strings, per_word=2, split="all")
    assert words.tolist() == ["apple", "bear", "apple"]
    torch.testing.assert_close(acts, cache.read([0, 1, 4]).acts)


def test_numbers_of_the_token_are_no_latents(tmp_path):
    """An SAE of layer-normed activations carries each token's deviation and mean in two more entries of its code."""
    sae = Normalised(planted_sae(), "layer_norm").eval()
    made = passages([0, 1] * 20)
    x = made.acts - 2  # the means are negative
    assert sae.d_sae == D + 2 and bool((sae.encode(x).values < 0).any())
    pooled = pool(sae, replace(made, acts=x))
    codes = sae.encode(x).dense().detach()[:, :D].reshape(40, -1, D).mean(1)
    np.testing.assert_allclose(pooled.latents, codes.numpy(), rtol=1e-5, atol=1e-6)
    assert pooled.z.shape == (40, D) and pooled.directions.shape == (D, D)  # and no signs
    assert probe_sets.encode(sae, x.numpy()).shape == (160, D)
    firings = collect(sae, ActivationCache.from_tensors(tmp_path / "cache", x))
    assert firings.d_sae == D and bool((firings.values > 0).all())
    assert two_sidedness(sae, firings)["two_sided_fraction"].n <= D


def test_two_sided_latents_and_antipodal_pairs():
    tokens = torch.arange(400) % 50
    latents = torch.zeros(400, dtype=torch.int64)
    values = torch.where(tokens < 25, 1.0, -1.0)
    one_sided = Firings(
        torch.cat([latents, latents + 1]), torch.cat([values, values.abs()]), torch.cat([tokens, tokens]), 400, 3
    )
    sae = SimpleNamespace(directions=torch.eye(3))
    got = two_sidedness(sae, one_sided)
    assert got["two_sided_fraction"].value == 0.5  # of the two living latents
    assert got["two_sided_axes"].value == 1
    assert "pole_separation" not in got  # one axis is no sample
    rng_tokens = torch.randint(50, (400,))
    both = Firings(
        torch.cat([latents, latents + 1]), torch.cat([values, values]), torch.cat([tokens, rng_tokens]), 400, 3
    )
    got = two_sidedness(sae, both)
    assert got["two_sided_fraction"].value == 1
    # one axis separates by almost a bit, the other not at all
    assert got["pole_separation"].value == pytest.approx(0.5, abs=0.1)
    W = torch.tensor([[1.0, 0], [0, 1], [-1, 0.1], [-0.2, -1]])
    assert {frozenset(p) for p in opposite_pairs(W)} == {frozenset({0, 2}), frozenset({1, 3})}
    unsigned = Firings(both.latents, both.values.abs(), both.tokens, 400, 4)
    got = two_sidedness(SimpleNamespace(directions=W), unsigned)
    assert got["two_sided_axes"].value == 0  # the partners never fire


def test_jensen_shannon_is_zero_for_equal_and_one_for_disjoint():
    a = torch.arange(10)
    assert jensen_shannon(a, a) == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(a, a + 10) == pytest.approx(1)


def test_collect_keeps_negative_firings(tmp_path):
    x = torch.randn(100, D)
    cache = ActivationCache.from_tensors(tmp_path / "c", x, torch.arange(100))
    got = collect(planted_sae(signed=True), cache, max_tokens=64)
    assert got.n == 64
    assert (got.values < 0).sum() == (x[:64] < 0).sum()
    torch.testing.assert_close(got.values, x[got.tokens, got.latents])


def test_built_in_sets_come_from_the_cached_text(tmp_path):
    tokens = torch.arange(96).view(6, 16)
    documents = torch.tensor([0, 0, 0, 1, 1, 1]).repeat_interleave(16).view(6, 16).clone()
    documents[2, 12:] = 1
    cache = ActivationCache.from_tensors(tmp_path / "c", torch.randn(6, 16, 4), tokens, documents=documents)
    got = from_cache(cache, lambda ids: "in 1984" if 0 in ids else "none", passage_tokens=8, split="all")
    assert got.n == 11  # the passage across two documents is left out
    assert got.labels["article"] == ["0"] * 5 + ["1"] * 6
    assert got.labels["year"] == ["yes"] + ["no"] * 10
    torch.testing.assert_close(got.acts[:8], cache.read(range(8)).acts)
    with pytest.raises(UserError, match="shorten"):
        from_cache(cache, passage_tokens=17)
    held_out = from_cache(cache, passage_tokens=8)  # by default no row that an SAE was trained on
    assert held_out.labels["article"] == ["1"] * 6


def test_jsonl_is_checked(tmp_path):
    path = tmp_path / "set.jsonl"
    cases = {
        '{"text": "a", "label": 1}\n\n{"text": "", "label": 2}': "set.jsonl:3 has an empty document",
        '{"text": "a"}': "set.jsonl:1 needs",
        "{": "set.jsonl:1 is not valid JSON",
        "[1]": "set.jsonl:1 is not a JSON object",
        "": "no examples",
    }
    for content, message in cases.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_jsonl(path)
    with pytest.raises(UserError, match="does not exist"):
        read_jsonl(tmp_path / "none")
    # JSON lets these two stand in a string as they are, and so do many corpora.
    path.write_text('{"text": "a\u2028b\x85c", "label": 1, "odd": 2}\n{"text": "d", "label": 1}', encoding="utf-8")
    texts, labels = read_jsonl(path)
    assert (texts, labels) == (["a\u2028b\x85c", "d"], {"label": ["1", "1"]})
    with pytest.raises(UserError, match="one class only"):
        Passages(torch.randn(2, 3), torch.arange(2), labels, str(path)).column("label")
    with pytest.raises(UserError, match="has no label"):
        Passages(torch.randn(2, 3), torch.arange(2), labels, str(path)).column("lable")


def test_texts_run_to_the_hook_and_no_further():
    class Above(nn.Module):
        def forward(self, h):
            raise AssertionError("not needed")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.above = nn.Embedding(20, 4), Above()

        def forward(self, input_ids, use_cache):
            return self.above(self.embed(input_ids))

    model = Model()

    def encode(text):
        return [0, *[int(word) for word in text.split()]]

    got = from_texts(model, Site("hook_embed", "embed", "out"), encode, ["3 4", "5"], {"y": ["a", "b"]}, source="set")
    assert got.owner.tolist() == [0, 0, 1]
    torch.testing.assert_close(got.acts, model.embed.weight[[3, 4, 5]].detach())
    with pytest.raises(UserError, match="example 2"):
        from_texts(model, Site("hook_embed", "embed", "out"), encode, ["3", ""], {"y": ["a", "b"]}, source="set")


def test_saebench_document_has_the_shape_its_plots_read(tmp_path):
    x = torch.randn(300, D)
    cache = ActivationCache.from_tensors(tmp_path / "c", x, held_out=0.5)
    sae = planted_sae()
    save(sae, tmp_path / "run", {"model_name": "toy", "hook_name": "h"})
    metrics = saebench_json.core(evaluate(sae, cache, config=EvaluateConfig(density_tokens=0)))
    content = saebench_json.document("core", metrics, config={"n": 1}, run=tmp_path / "run")
    path = saebench_json.save(content, tmp_path / "results")
    read = json.loads(path.read_text())
    keys = "eval_type_id eval_config eval_id datetime_epoch_millis eval_result_metrics eval_result_details"
    keys += (
        " eval_result_unstructured sae_bench_commit_hash sae_lens_id sae_lens_release_id sae_lens_version sae_cfg_dict"
    )
    assert set(read) == set(keys.split())
    assert read["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(float((x[150:] > 0).sum(1).float().mean()))
    assert read["sae_cfg_dict"]["model_name"] == "toy"
    assert path.parent.name == "core"


def test_pooled_of_unsigned_codes_has_one_pole_per_latent():
    pooled = pool(planted_sae(), passages(np.tile([0, 1], 20)))
    assert isinstance(pooled, Pooled)
    assert pooled.z.shape == (40, D)

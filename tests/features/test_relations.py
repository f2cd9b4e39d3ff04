"""Co-activation partners and offline labels, against brute force and planted rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saelab import ActivationCache
from saelab.features import FeatureIndex, IndexConfig, build_index
from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.groups import group_top, systematic
from saelab.features.indexing.labels import half_of, parse_label
from saelab.features.indexing.partners import MIN_TOGETHER
from tests.features.lookup import Lookup

CONTEXT, N_CONTEXTS, VOCAB = 32, 80, 40
RULES = ["token: w5 · w3", "after: w4", "before: w6", "near: w8", "phrase: w1 w2"]


def make(folder: Path, code: torch.Tensor, tokens: torch.Tensor, config: IndexConfig) -> FeatureIndex:
    acts = torch.randn(len(code), 4)
    acts[:, 0] = torch.arange(len(code))
    cache = ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT)
    words = [f" w{i}" for i in range(VOCAB)]
    return build_index(Lookup(code), cache, folder / "run", token_strings=words, config=config)


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureIndex, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    n = CONTEXT * N_CONTEXTS
    tokens = torch.randint(0, VOCAB, (n,))
    tokens[(tokens == 8) & (torch.rand(n) < 0.7)] = 9  # rare, so that "near" it says something
    tokens[1:][(tokens[:-1] == 1) & (torch.rand(n - 1) < 0.5)] = 2  # a phrase frequent enough to be learnt
    grid = tokens.view(N_CONTEXTS, CONTEXT)
    code = torch.zeros(N_CONTEXTS, CONTEXT, 7)
    code[..., 0] = (grid == 3).float() + 3 * (grid == 5).float()
    code[:, 1:, 1] = (grid == 4).float()[:, :-1]
    code[:, :-1, 2] = (grid == 6).float()[:, 1:]
    for place in range(CONTEXT):
        code[:, place, 3] = (grid[:, max(place - 15, 0) : place + 1] == 8).any(1).float()
    code[:, 1:, 4] = ((grid[:, :-1] == 1) & (grid[:, 1:] == 2)).float()
    code[..., 5] = (torch.rand(N_CONTEXTS, CONTEXT) < 0.02).float()
    code = code.view(n, 7)
    index = make(tmp_path_factory.mktemp("ruled"), code, tokens, IndexConfig(label_sample=10**6, chunk_latents=2))
    return index, code, tokens


@pytest.mark.parametrize("latent", range(len(RULES)))
def test_a_planted_rule_is_found_and_scored(ruled, latent: int) -> None:
    row = ruled[0].latent(latent)
    assert row["label"] == RULES[latent]
    assert row["label_recall"] == pytest.approx(1.0)
    # How often a token is near is counted in 4096 windows; the other rules are counted exactly.
    assert row["label_score"] == pytest.approx(1.0, abs=0.03 if latent == 3 else 1e-6)
    assert row["label_mass"] == pytest.approx(1.0)


def test_noise_and_silence_have_no_good_label(ruled) -> None:
    noise, silent = ruled[0].latent(5), ruled[0].latent(6)
    assert not noise["label"] or noise["label_score"] < 0.3
    assert silent["label"] == "" and np.isnan(silent["label_score"])


def test_scores_are_those_of_the_half_not_chosen_on(tmp_path: Path) -> None:
    n = CONTEXT * N_CONTEXTS
    tokens = torch.randint(0, VOCAB, (n,))
    # Fires on token 3 with a hit rate and a false alarm rate.
    fires = ((tokens == 3) & (torch.rand(n) < 0.8)) | (torch.rand(n) < 0.01)
    index = make(tmp_path, fires.float()[:, None].repeat(1, 2), tokens, IndexConfig(label_sample=10**6))
    row = index.latent(0)
    words = {int(word.removeprefix("w")) for word in row["label"].removeprefix("token: ").split(" · ")}
    cache = ActivationCache(tmp_path / "cache")
    scored = torch.from_numpy(half_of(Corpus(cache, tmp_path / "corpus", n).contexts(np.arange(n))) == 1)
    assert 0.3 < scored.float().mean() < 0.7
    predicted = torch.tensor([t in words for t in tokens.tolist()])
    true = float((predicted & fires & scored).sum())
    # The firing total is scaled from all firings, exact here because none was left out.
    precision, recall = true / float((predicted & scored).sum()), true / float((fires & scored).sum())
    assert row["label_precision"] == pytest.approx(precision)
    assert row["label_recall"] == pytest.approx(recall)
    assert row["label_score"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_a_label_names_what_the_strong_firings_share(tmp_path: Path) -> None:
    """Weak firings are many and elsewhere: counted alike, they would decide."""
    n = CONTEXT * N_CONTEXTS
    tokens = torch.randint(0, VOCAB, (n,))
    strong = (tokens == 3) & (torch.rand(n) < 0.9)
    weak = ((tokens == 5) | (tokens == 7)) & (torch.rand(n) < 0.5)
    code = 10.0 * strong + 0.1 * weak
    row = make(tmp_path, code[:, None].repeat(1, 2), tokens, IndexConfig(label_sample=10**6)).latent(0)
    assert row["label"] == "token: w3"
    scored = torch.from_numpy(
        half_of(Corpus(ActivationCache(tmp_path / "cache"), tmp_path / "corpus", n).contexts(np.arange(n))) == 1
    )
    met, firing, said = (float((x & scored).sum()) for x in (strong, strong | weak, tokens == 3))
    assert row["label_score"] == pytest.approx(2 * met / (said + firing))
    assert row["label_recall"] == pytest.approx(met / firing) and row["label_recall"] < 0.6
    mass = float(code[strong & scored].sum() / code[scored].sum())
    assert row["label_mass"] == pytest.approx(mass) and mass > 0.95


def test_a_labels_text_is_read_back() -> None:
    assert parse_label("phrase: New York · in the") == ("phrase", ["New York", "in the"])
    assert parse_label("token: :") == ("token", [":"])


@pytest.mark.parametrize("signed", [False, True])
def test_partners_match_brute_force(tmp_path: Path, signed: bool) -> None:
    n, d_sae = CONTEXT * 10, 14
    code = torch.randn(n, d_sae).masked_fill(torch.rand(n, d_sae) > 0.15, 0.0)
    code[:, 1] = code[:, 0] * (torch.rand(n) > 0.3)  # a close companion
    code = code if signed else code.abs()
    config = IndexConfig(partner_sample=10**6, partners=3, run_entries=200, chunk_latents=4)
    index = make(tmp_path, code, torch.randint(0, VOCAB, (n,)), config)
    slots = torch.stack([code > 0, code < 0], 2).reshape(n, -1).double()
    both = slots.T @ slots
    count = both.diagonal().clone()
    jaccard = both / (count[:, None] + count - both)
    pmi = torch.log2(both * n / (count[:, None] * count))
    for pole in index.poles:
        for latent in range(d_sae):
            slot = 2 * latent + (pole < 0)
            row = index.latent(latent, pole)
            partners = [2 * j + (p < 0) for j, p in zip(row["partners"], row["partner_poles"])]
            assert len(set(partners)) == len(partners) and slot not in partners
            assert row["partner_jaccard"] == pytest.approx(jaccard[slot, partners].tolist())
            assert row["partner_pmi"] == pytest.approx(pmi[slot, partners].tolist(), abs=1e-5)
            allowed = (both[slot] >= MIN_TOGETHER) & (torch.arange(len(count)) != slot)
            best = jaccard[slot].masked_fill(~allowed, -1.0).topk(3)
            assert sorted(row["partner_jaccard"][:3]) == pytest.approx(sorted(best.values[best.values > 0].tolist()))
            best_pmi = pmi[slot].masked_fill(~allowed, -99.0).max()
            assert best_pmi == -99 or max(row["partner_pmi"]) == pytest.approx(best_pmi.item(), abs=1e-5)
    assert index.latent(0)["partners"][0] == 1


def test_sampled_partners_are_close(tmp_path: Path) -> None:
    n = 4000
    code = torch.zeros(n - n % CONTEXT, 2)
    code[:, 0] = 1.0
    code[:, 1] = (torch.rand(len(code)) < 0.4).float()
    index = make(tmp_path, code, torch.zeros(len(code), dtype=torch.int64), IndexConfig(partner_sample=100))
    # Five standard errors of a share counted in 100 firings.
    assert index.latent(0)["partner_jaccard"][0] == pytest.approx(float(code[:, 1].mean()), abs=5 * 0.05)


def test_sampling_draws_each_offset_once_and_equally_often() -> None:
    sizes = np.array([0, 1, 3, 10])
    drawn = np.zeros((4, 10))
    for seed in range(600):
        group, offset, number = systematic(sizes, 4, np.random.default_rng(seed))
        assert len({*zip(group, offset)}) == len(group)
        assert np.bincount(group, minlength=4).tolist() == [0, 1, 3, 4]
        drawn[group, offset] += 1
        assert number.max() == 3
    assert drawn[3, :].min() > 600 * 0.4 * 0.75


def test_group_top_orders_negative_scores() -> None:
    groups, scores = np.array([1, 0, 1, 1, 0]), np.array([-2.0, 1.0, 0.5, -0.1, 3.0])
    assert group_top(groups, scores, 2).tolist() == [4, 1, 2, 3]

"""Each metric against a brute-force oracle, and the traps of public tools."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from saelab.data.synthetic import Planted, Tree, mixing
from saelab.errors import UserError
from saelab.metrics import (
    FiringCounts,
    ReconstructionSums,
    absorption_cosine,
    babel,
    babel_co_selected,
    coherence_histogram,
    correlation_errors,
    effective_rank,
    feature_detection,
    intervals,
    match_dictionary,
    matched_correlation,
    max_cosines,
    proportion,
    reconstruction,
    stability,
    t_interval,
    zipf_fit,
)
from saelab.metrics.intervals import from_resamples, resampled_sums
from saelab.sparse import SparseCode


def _data(n=400, d=6, d_sae=15, offset=5.0, signed=True):
    x = torch.randn(n, d, dtype=torch.float64) * torch.linspace(0.5, 2, d) + offset
    acts = torch.randn(n, d_sae, dtype=torch.float64) * (torch.rand(n, d_sae) < 0.2)
    acts = acts if signed else acts.abs()
    recon = x + 0.4 * torch.randn(n, d, dtype=torch.float64) + 0.1
    return x, recon, SparseCode.from_dense(acts), acts


def _sums(x, recon, code, clusters=None, centre=None, batch=None):
    clusters = torch.arange(x.shape[0]) % 7 if clusters is None else clusters
    sums = ReconstructionSums(int(clusters.max()) + 1, x.mean(0) if centre is None else centre)
    for start in range(0, x.shape[0], batch or x.shape[0]):
        rows = slice(start, min(start + (batch or x.shape[0]), x.shape[0]))
        sums.update(x[rows], recon[rows], code[rows], clusters[rows])
    return sums


def test_reconstruction_metrics_equal_their_formulas():
    x, recon, code, acts = _data()
    e, mu = x - recon, x.mean(0)

    def norm(v):
        return v.norm(dim=1)

    want = {
        "fvu": (norm(e) ** 2).sum() / (norm(x - mu) ** 2).sum(),
        "mse": (norm(e) ** 2).mean(),
        "nmse": (norm(e) ** 2 / norm(x) ** 2).mean(),
        "cosine": torch.cosine_similarity(x, recon).mean(),
        "l2_ratio": (norm(recon) / norm(x)).mean(),
        "relative_reconstruction_bias": (norm(recon) ** 2).mean() / (x * recon).sum(1).mean(),
        "l0": (acts != 0).sum(1).double().mean(),
        "l1": acts.abs().sum(1).mean(),
        "legacy_fraction_variance_explained": 1 - e.var(0).sum() / x.var(0).sum(),
        "legacy_explained_variance_per_token": (1 - norm(e) ** 2 / norm(x - mu) ** 2).mean(),
        "legacy_explained_variance_squared_moment": 1
        - (norm(e) ** 2).mean() / ((norm(x) ** 2).mean() - (x**2).mean() ** 2),
        "legacy_mse_per_batch": (norm(e) ** 2).mean() / 2048,
        "legacy_l1_with_signs": acts.sum(1).mean(),
        "legacy_r2_global": 1 - (e**2).mean() / ((x - x.mean()) ** 2).mean(),
    }
    want["explained_variance"] = 1 - want["fvu"]
    got = _sums(x, recon, code, batch=37).estimates()
    assert set(got) == set(want)
    for name, value in want.items():
        # float64 sums of 400 tokens in another order: 400 eps, with a margin of ten
        assert got[name].value == pytest.approx(float(value), rel=1e-12), name
        assert got[name].n == 400
        assert got[name].low <= got[name].value <= got[name].high


def test_a_constant_error_costs_variance_here_and_nothing_in_the_legacy_formula():
    x = torch.randn(200, 4, dtype=torch.float64)
    code = SparseCode.from_dense(torch.ones(200, 2, dtype=torch.float64))
    got = _sums(x, x + 1.0, code).estimates()
    assert got["fvu"].value > 0.8
    assert got["legacy_fraction_variance_explained"].value == pytest.approx(1.0)


def test_squared_moment_formula_exceeds_one_on_offset_data():
    x = 5 + torch.randn(20_000, 10, dtype=torch.float64)
    code = SparseCode.from_dense(torch.ones(20_000, 1, dtype=torch.float64))
    got = _sums(x, x + 0.3 * torch.randn_like(x), code).estimates()
    assert got["explained_variance"].value == pytest.approx(0.91, abs=0.005)
    assert got["legacy_explained_variance_squared_moment"].value > 1


def test_a_large_common_offset_costs_no_digits():
    x, recon, code, _ = _data(offset=0.0)
    near, far = _sums(x, recon, code), _sums(x + 1e6, recon + 1e6, code)
    assert far.estimates()["fvu"].value == pytest.approx(near.estimates()["fvu"].value, rel=1e-8)


def test_bootstrap_interval_matches_resampling_by_hand():
    x, recon, code, _ = _data(n=90)
    clusters = torch.arange(90) // 9
    got = _sums(x, recon, code, clusters).estimates(seed=3)["fvu"]
    rng = np.random.default_rng(3)
    counts = rng.multinomial(10, np.full(10, 0.1), size=1000)
    values = []
    for count in counts:
        rows = torch.cat([torch.arange(90)[clusters == c].repeat(int(m)) for c, m in enumerate(count) if m])
        values.append(float((x - recon)[rows].square().sum() / (x[rows] - x[rows].mean(0)).square().sum()))
    low, high = np.quantile(values, [0.025, 0.975])
    assert (got.low, got.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))


def test_neighbours_are_resampled_together_where_contexts_are_too_many_to_hold(monkeypatch):
    x, recon, code, _ = _data(n=90)
    alone, by_hand = (_sums(x, recon, code, torch.arange(90) // part).estimates() for part in (1, 9))
    monkeypatch.setattr(reconstruction, "HELD", 10 * x.shape[1])
    got = _sums(x, recon, code, torch.arange(90)).estimates()
    assert got["fvu"].value == pytest.approx(alone["fvu"].value, rel=1e-12)
    assert (got["fvu"].low, got["fvu"].high) == pytest.approx((by_hand["fvu"].low, by_hand["fvu"].high), rel=1e-12)
    assert got["fvu"].interval == "95 % percentile bootstrap over 10 groups of 9 documents"
    assert by_hand["fvu"].interval == "95 % percentile bootstrap over 10 documents"


def test_reports_never_hold_nan():
    x = torch.ones(10, 3, dtype=torch.float64)
    code = SparseCode.from_dense(torch.zeros(10, 2, dtype=torch.float64))
    with pytest.raises(UserError, match="equal"):
        _sums(x, x, code).estimates()
    with pytest.raises(UserError, match="no tokens"):
        ReconstructionSums(3, torch.zeros(2)).estimates()
    x = torch.cat([torch.zeros(2, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)])
    got = _sums(x, torch.zeros_like(x), code, centre=torch.zeros(3)).estimates()
    assert all(math.isfinite(e.value) for e in got.values())
    assert got["nmse"].value == pytest.approx(1.0)  # the two zero tokens have no ratio and are left out
    with pytest.raises(ValueError, match="finite"):
        from_resamples(np.array([np.nan, 1.0]), 1, "token", "f", 1)


def test_the_bootstrap_does_not_depend_on_how_much_of_it_is_held(monkeypatch):
    columns = np.random.default_rng(0).random((40, 3)), np.random.default_rng(1).random(40)
    at_once = resampled_sums(*columns, seed=5)
    monkeypatch.setattr(intervals, "HELD", 40 * 7)
    few = resampled_sums(*columns, seed=5)
    assert [part.shape for part in few] == [(1001, 3), (1001,)]
    for a, b in zip(at_once, few):
        np.testing.assert_allclose(a, b, rtol=1e-12)  # sums of 40 numbers, in another order at most
    np.testing.assert_allclose(few[0][0], columns[0].sum(0), rtol=1e-12)


def test_firing_counts_see_negative_values():
    acts = torch.zeros(10, 4)
    acts[:, 0] = -1.0
    acts[:3, 1] = 2.0
    acts[3:4, 1] = -2.0
    counts = FiringCounts(4)
    counts.update(SparseCode.from_dense(acts[:5]))
    counts.update(SparseCode.from_dense(acts[5:]))
    assert counts.density.tolist() == [1.0, 0.4, 0.0, 0.0]
    assert (counts.positive.tolist(), counts.negative.tolist()) == ([0, 3, 0, 0], [10, 1, 0, 0])
    got = counts.estimates()
    assert got["dead_fraction"].value == 0.5
    assert "10 tokens" in got["dead_fraction"].formula
    assert (got["dense_fraction"].value, got["ultra_dense_fraction"].value) == (0.5, 0.25)
    histogram = counts.histogram()
    assert sum(histogram["latents"]) == 4
    assert histogram["latents"][0] == 2


def test_wilson_and_t_intervals():
    from scipy.stats import binomtest

    for count in (0, 3, 20):
        got, want = proportion(count, 20, "latent", "f"), binomtest(count, 20).proportion_ci(method="wilson")
        assert (got.low, got.high) == (pytest.approx(want.low), pytest.approx(want.high))
    low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == (pytest.approx(2 - 4.302652729911275 / math.sqrt(3)), pytest.approx(2 + 2.4841377118))


def test_zipf_fit_finds_the_law_and_where_it_breaks():
    ranks = np.arange(1, 501)
    density = 0.3 * (ranks + 7.0) ** -1.2
    fit = zipf_fit(np.concatenate([density, np.zeros(20)]))
    assert (fit.s, fit.q) == (pytest.approx(1.2, abs=0.01), pytest.approx(7.0, rel=0.03))
    assert fit.r2 > 0.9999
    assert fit.breaks_at is None
    density[450:] /= 10
    assert zipf_fit(density).breaks_at == 451
    with pytest.raises(UserError, match="too few"):
        zipf_fit(np.ones(5))


def test_babel_equals_the_search_over_all_sets():
    W = torch.randn(7, 5, dtype=torch.float64)
    unit = W / W.norm(dim=1, keepdim=True)
    gram = (unit @ unit.T).abs()
    for r in (1, 2, 3):
        want = max(
            float(gram[j, list(S)].sum()) for S in itertools.combinations(range(7), r) for j in set(range(7)) - set(S)
        )
        assert float(babel(W, 3)[r - 1]) == pytest.approx(want)
    with pytest.raises(UserError):
        babel(W, 7)


def test_babel_of_co_selected_sets():
    W = torch.randn(6, 4, dtype=torch.float64)
    acts = torch.zeros(3, 6, dtype=torch.float64)
    acts[0, [0, 2, 5]], acts[1, [1, 3]], acts[2, 4] = 1.0, -1.0, 1.0
    want = (babel(W[[0, 2, 5]], 2) + babel(W[[1, 3]], 1).expand(2)) / 2
    torch.testing.assert_close(babel_co_selected(W, SparseCode.from_dense(acts), 2), want)


def test_coherence_and_effective_rank():
    W = torch.randn(30, 8)
    cosines = torch.cosine_similarity(W[:, None].double(), W[None].double(), dim=-1).fill_diagonal_(-2)
    torch.testing.assert_close(max_cosines(W), cosines.amax(1))
    _, counts = coherence_histogram(W, bins=10)
    assert counts == torch.histc(cosines[cosines > -2], 10, -1, 1).long().tolist()
    assert effective_rank(SparseCode.from_dense(torch.eye(5).repeat(3, 1))) == pytest.approx(5)
    acts = torch.randn(50, 6, dtype=torch.float64)
    p = torch.linalg.eigvalsh(acts.T @ acts)
    p = p / p.sum()
    assert effective_rank(SparseCode.from_dense(acts)) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))


def test_stability_is_blind_to_order_and_for_signed_latents_to_sign():
    W = torch.randn(12, 20)
    shuffled = W[torch.randperm(12)]
    assert stability(W, shuffled) == pytest.approx(1)
    assert stability(W, -shuffled, signed=True) == pytest.approx(1)
    assert stability(W, -shuffled) < 0.8


def test_planted_dictionary_has_the_statistics_it_promises():
    planted = Planted(16, 40, l0=4, zipf=0.7, correlated=3, anticorrelated=3, signed=8, noise=0.0)
    x, truth = planted.sample(20_000, seed=1)
    acts = truth.dense()
    torch.testing.assert_close(acts @ planted.directions, x)
    # five standard errors of a frequency at 20,000 tokens
    density = (acts != 0).double().mean(0)
    assert ((density - planted.frequencies).abs() < 5 * (planted.frequencies / 20_000).sqrt()).all()
    on = (acts != 0).double()
    phi = torch.corrcoef(on.T)
    assert phi[0, 1] > 0.4
    assert phi[6, 7] < 0
    assert phi[14, 15].abs() < 0.05
    assert (acts[:, :32] >= 0).all()
    assert 0.4 < (acts[:, -1][acts[:, -1] != 0] > 0).double().mean() < 0.6
    with pytest.raises(UserError):
        Planted(4, 4, signed=9)


def test_perfect_and_broken_recovery():
    planted = Planted(32, 12, l0=3, signed=4)
    _, truth = planted.sample(3000, seed=0)
    order = torch.randperm(12)
    sign = torch.where(torch.rand(12) < 0.5, 1.0, -1.0)
    W = planted.directions[order] * sign[:, None]
    code = SparseCode.from_dense(truth.dense()[:, order] * sign)
    matching = match_dictionary(W, planted.directions, signed=True)
    assert (order[matching.latents] == matching.features).all()
    assert matching.mean_cosine == pytest.approx(1)
    assert matched_correlation(code, truth, signed=True) == pytest.approx(1)
    assert matched_correlation(code, truth) < 1
    assert feature_detection(code, truth, matching).f1.min() == pytest.approx(1)
    noisy = SparseCode.from_dense(code.dense() * (torch.rand(3000, 12) < 0.5))
    got = feature_detection(noisy, truth, matching)
    want = [
        f1_score(truth.dense()[:, f] != 0, noisy.dense()[:, m] != 0)
        for f, m in zip(matching.features, matching.latents)
    ]
    assert got.f1.tolist() == pytest.approx(want)


def test_tree_is_the_published_one():
    children = [0, 0.0895, 0.163, 0.226, 0.282, 0.3335, 0.3825, 0.431, 0.482, 0.5407]
    parents = [0, 0.3, 0.44, 0.529, 0.594, 0.6467, 0.692, 0.733, 0.7739, 0.8182]
    for i, (child, parent) in enumerate(zip(children, parents)):
        # The published tables have one to four digits.
        assert mixing(i / 10, 3) == pytest.approx(child, abs=1e-3)
        assert mixing(i / 10, 11) == pytest.approx(parent, abs=1e-3)
    tree = Tree(0.6)
    gram = tree.directions @ tree.directions.T
    same = tree.groups[:, None] == tree.groups
    off = ~torch.eye(20, dtype=torch.bool)
    assert gram[same & off].sub(0.6).abs().max() < 1e-5
    assert gram[~same].abs().max() < 1e-5
    x, acts = tree.sample(50_000, torch.Generator().manual_seed(0))
    on = (acts != 0).double()
    assert on.sum(1).mean() == pytest.approx(1.36, abs=0.015)
    assert (on[:, tree.levels == 0].sum(1) == 1).all()
    assert on[:, 0].mean() == pytest.approx(0.2, abs=0.01)
    assert on[:, 15].mean() == pytest.approx(0.05, abs=0.005)
    assert on[on[:, 4] > 0][:, 6].mean() == pytest.approx(0.2, abs=0.02)
    assert on[on[:, 4] == 0][:, 5:8].sum() == 0
    assert acts[acts != 0].mean() == pytest.approx(1.5, abs=0.01)
    assert acts[acts != 0].std() == pytest.approx(0.25, abs=0.005)
    torch.testing.assert_close(x, acts @ tree.directions)


def test_absorption_and_correlation_errors():
    tree = Tree(0.3)
    exact = match_dictionary(tree.directions, tree.directions)
    assert absorption_cosine(tree.directions, tree.directions, tree.parents, exact) == pytest.approx(0, abs=1e-6)
    flat, across = correlation_errors(tree.directions, tree.directions, tree.groups, tree.levels, exact)
    assert (flat, across) == (pytest.approx(0, abs=1e-10), pytest.approx(0, abs=1e-10))
    absorbed = tree.directions.clone()
    children = tree.levels == 1
    absorbed[children] += tree.directions[tree.parents[children]]
    got = absorption_cosine(absorbed, tree.directions, tree.parents, exact)
    assert got == pytest.approx(1 / math.sqrt(2), abs=1e-6)
    flat, across = correlation_errors(absorbed, tree.directions, tree.groups, tree.levels, exact)
    assert flat > 0.01
    assert across > 0.01
    orthogonal = Tree(0.0).directions
    flat, across = correlation_errors(orthogonal, tree.directions, tree.groups, tree.levels, exact)
    assert (flat, across) == (pytest.approx(0.09, abs=1e-6), pytest.approx(0, abs=1e-10))

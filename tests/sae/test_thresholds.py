"""Thresholds that stand in for a batch's budget, and the Zipf law behind Feature Choice's budgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.sae import build, threshold, zipf
from saelab.sae.feature_choice import FeatureChoice
from saelab.sae.threshold import BatchBudgetSAE, RunningMean
from saelab.sae.zipf import Zipf

D_IN, D_SAE = 6, 40


def test_running_mean_is_the_weighted_mean_of_what_it_saw() -> None:
    mean, values = RunningMean(rate=0.1), torch.randn(30, dtype=torch.float64)
    assert mean.mean() == 0
    for i, value in enumerate(values):
        mean.update(value)
        weights = 0.9 ** torch.arange(i, -1, -1, dtype=torch.float64)
        torch.testing.assert_close(mean.mean(), (weights * values[: i + 1]).sum() / weights.sum())


def test_running_mean_of_elements_counts_their_own_updates() -> None:
    mean = RunningMean(3, rate=0.5)
    mean.update(torch.tensor([1.0, 2.0, 9.0]), where=torch.tensor([True, True, False]))
    mean.update(torch.tensor([3.0, 9.0, 9.0]), where=torch.tensor([True, False, False]))
    assert mean.mean().tolist() == pytest.approx([(0.5 * 1 + 3) / 1.5, 2.0, 0.0])


def test_thresholds_stay_in_float64_whatever_the_model_becomes() -> None:
    sae = build("batch_topk", D_IN, D_SAE, k=2)
    assert isinstance(sae, BatchBudgetSAE)
    sae.threshold.set_(torch.tensor(1 + 1e-12, dtype=torch.float64))
    sae.to(torch.bfloat16)
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.threshold.mean().item() == 1 + 1e-12


@pytest.mark.parametrize("name", ["batch_topk", "mutual_choice", "matryoshka", "batch_topk-signed"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_calibration_gives_k_active_latents_on_average(name: str, k: int) -> None:
    sae = build(name.removesuffix("-signed"), D_IN, D_SAE, k=k, signed=name.endswith("-signed"))
    x = torch.randn(500, D_IN)
    sae.calibrate(x.split(64))
    assert sae.eval().encode(x).l0().sum() == 500 * k


def test_calibration_looks_deeper_where_a_chunk_spends_far_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "CHUNK", 50)
    sae = build("batch_topk", D_IN, D_SAE, k=1)
    x = torch.cat([50 * torch.randn(50, D_IN), 0.1 * torch.randn(950, D_IN)])  # one chunk takes nearly all entries
    sae.calibrate([x])
    assert sae.eval().encode(x).l0().sum() == 1000


def test_calibration_with_too_few_positives_is_relu() -> None:
    sae = build("batch_topk", D_IN, D_SAE, k=30)
    assert isinstance(sae, BatchBudgetSAE)
    with torch.no_grad():
        sae.b_enc.fill_(-1)
    x = torch.randn(50, D_IN)
    sae.calibrate([x])
    assert sae.threshold.mean() == 0
    assert 0 < sae.eval().encode(x).l0().sum() < 50 * 30


def test_calibration_uses_no_more_than_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "SAMPLE_NUMBERS", 100 * D_IN)
    sample = threshold.calibration_sample(torch.arange(300.0)[:, None].expand(-1, D_IN).split(70), D_IN)
    assert sample is not None and sample[:, 0].tolist() == list(range(100))
    assert threshold.calibration_sample([], D_IN) is None


@pytest.mark.parametrize("signed", [False, True])
def test_latent_thresholds_give_each_latent_its_rate(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "SAMPLE_NUMBERS", 400 * 7)  # several runs of latents
    sae = build("feature_choice", D_IN, D_SAE, k=4, mutual_share=0.0, signed=signed)
    assert isinstance(sae, FeatureChoice)
    sae.rates.copy_(torch.rand(D_SAE) * 0.4)
    sae.rates[:2] = torch.tensor([0.9, 0.0])  # more than ever positive; never
    x = torch.randn(400, D_IN)
    thresholds = threshold.latent_thresholds(sae, x, sae.rates)
    assert (thresholds >= 0).all()
    sae.latent_threshold.set_(thresholds)
    counts = sae.eval().encode(x).firing_counts()
    acts = sae.pre_acts(x, slice(None))
    possible = ((acts != 0) if signed else (acts > 0)).sum(0)
    assert torch.equal(counts, torch.minimum((sae.rates * 400).round().long(), possible))


def test_fit_recovers_a_planted_law() -> None:
    ranks = torch.arange(1, 2001, dtype=torch.float64)
    density = 0.7 * (ranks + 20) ** -1.3
    density[1600:] *= 0.1  # the tail falls below the law; the fit must not follow it
    law = zipf.fit(density[torch.randperm(2000)])
    assert law.s == pytest.approx(1.3, rel=0.02) and law.q == pytest.approx(20, rel=0.1) and law.r2 > 0.9999
    many = torch.arange(1, 100_001, dtype=torch.float64)
    law = zipf.fit((many + 300) ** -1.1)
    assert law.s == pytest.approx(1.1, rel=0.02) and law.q == pytest.approx(300, rel=0.1)
    pure = zipf.fit(ranks**-0.8)
    assert pure.s == pytest.approx(0.8, rel=1e-3) and pure.q < 0.1


@pytest.mark.parametrize("density", [torch.zeros(10), torch.ones(10), torch.tensor([0.5, 0.1, 0.0])])
def test_fit_without_a_law_is_uniform(density: torch.Tensor) -> None:
    law = zipf.fit(density)
    assert law == Zipf(0.0, 0.0, 0.0)
    assert zipf.rates(law, 10, 3).tolist() == pytest.approx([0.3] * 10)


@given(d_sae=st.integers(1, 300), q=st.floats(0, 50), s=st.floats(0, 3), share=st.floats(0.001, 1))
@settings(deadline=None, max_examples=50)
def test_rates_fall_and_add_up(d_sae: int, q: float, s: float, share: float) -> None:
    k = max(share * d_sae, 1e-3)
    rates = zipf.rates(Zipf(q, s, 1.0), d_sae, k)
    assert rates.sum().item() == pytest.approx(k)
    assert (rates >= 0).all() and (rates <= 1 + 1e-12).all() and (rates.diff() <= 1e-12).all()
    below = rates[rates < 1 - 1e-9]
    weights = (torch.arange(1, d_sae + 1, dtype=torch.float64) + q) ** -s
    if below.numel() > 1:  # proportional to the law wherever they are not capped
        torch.testing.assert_close(below / below[0], weights[-below.numel() :] / weights[-below.numel()])


@given(
    d_sae=st.integers(1, 200),
    n=st.integers(1, 500),
    share=st.floats(0.01, 1),
    s=st.floats(0, 2),
    turn=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=100)
def test_budgets_add_up_exactly(d_sae: int, n: int, share: float, s: float, turn: int) -> None:
    k = min(max(1.0, share * d_sae), float(d_sae))
    rates = zipf.rates(Zipf(0.0, s, 1.0), d_sae, k)[torch.randperm(d_sae)]
    budgets = zipf.budgets(rates, n, k, turn)
    assert budgets.sum() == int(k * n)
    assert (budgets >= 0).all() and (budgets <= n).all()
    exact = rates * n * (int(k * n) / (k * n))
    assert ((budgets - exact).abs() < 1 + 1e-3).all()


def test_what_a_share_has_beyond_the_batch_goes_to_the_next_latents() -> None:
    """While k warms up, the rates of latents that are always active ask for more tokens than there are."""
    rates = torch.tensor([0.25, 1.0, 0.5, 0.25], dtype=torch.float64)
    assert zipf.budgets(rates, 16, 3.0, 0).tolist() == [10, 16, 16, 6]  # shares of 6, 24, 12, 6
    for turn in range(50):
        budgets = zipf.budgets(rates, 16, 3.3, turn)
        assert budgets.sum() == 52 and budgets.max() <= 16


def test_latents_below_one_token_take_turns() -> None:
    rates = zipf.rates(Zipf(2.0, 1.2, 1.0), 60, 1.5)
    total = sum(zipf.budgets(rates, 16, 1.5, turn) for turn in range(2000))
    assert (rates * 16).min() < 0.2
    torch.testing.assert_close(total.double() / 2000, rates * 16, atol=2e-3, rtol=0)


def test_by_rank_gives_the_densest_latent_the_highest_rate() -> None:
    density = torch.tensor([0.1, 0.4, 0.0, 0.4])
    assert zipf.by_rank(density, torch.tensor([4.0, 3.0, 2.0, 1.0])).tolist() == [2.0, 4.0, 1.0, 3.0]

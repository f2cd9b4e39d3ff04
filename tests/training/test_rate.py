"""The default learning rate: the rule's values, where it gives way to the published rate, and who uses it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import build
from saelab.training import TrainConfig, chosen_rate, prepared, train
from saelab.training.rate import automatic, published


def tiny_cache(folder: Path) -> ActivationCache:
    x = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
    return ActivationCache.from_tensors(folder / "cache", x, held_out=0.1)


def test_values_of_the_rule_by_hand():
    # 2.4e-3 (920 / 500)^-0.3 (4608 / 4096)^-0.5, the demo
    assert automatic(4608, 920, 2048).value == pytest.approx(2.4e-3 * 1.84**-0.3 * 1.125**-0.5)
    assert automatic(4096, 500, 512).value == pytest.approx(2.4e-3)
    assert "920 steps" in automatic(4608, 920, 2048).why


def test_short_runs_and_narrow_saes_do_not_extrapolate_to_high_rates():
    assert automatic(768, 100, 512) == automatic(64, 3, 512)
    assert automatic(64, 3, 512).value < 0.01


@pytest.mark.parametrize("batch_size", [131_072, 1_000_000])
def test_at_the_published_batch_the_published_rate_holds(batch_size: int):
    assert automatic(2**16, 1000, batch_size).value == published(2**16) == pytest.approx(1e-4)


def test_between_the_two_batches_the_rate_falls_without_a_jump():
    batches = [8192, 16_384, 65_536, 131_071, 131_072]
    rates = [automatic(2**14, 1000, batch).value for batch in batches]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == automatic(2**14, 1000, 512).value
    assert rates[3] == pytest.approx(rates[4], rel=1e-3)
    middle = automatic(2**14, 1000, 2**15).value  # half-way between 2^13 and 2^17 in the logarithm
    assert middle == pytest.approx(math.sqrt(rates[0] * rates[4]))


def test_long_runs_end_at_the_published_rate_and_not_below():
    assert automatic(2**14, 10**9, 2048).value == published(2**14)


def test_fine_tuning_takes_the_published_rate(tmp_path: Path):
    cache, sae = tiny_cache(tmp_path), build("topk", 16, 64, k=4)
    given = TrainConfig(epochs=1, batch_size=64)
    assert prepared(sae, cache, given, fine_tuning=True).lr == published(64)
    assert prepared(sae, cache, given).lr == chosen_rate(sae, cache, given).value > published(64)


def test_a_rate_given_by_hand_is_kept(tmp_path: Path):
    cache, sae = tiny_cache(tmp_path), build("topk", 16, 64, k=4)
    assert prepared(sae, cache, TrainConfig(epochs=1, batch_size=64, lr=3e-4)).lr == 3e-4
    assert prepared(sae, cache, TrainConfig(epochs=1, batch_size=64, lr=3e-4), fine_tuning=True).lr == 3e-4


def test_training_steps_use_the_rate_of_the_rule(tmp_path: Path):
    cache, sae = tiny_cache(tmp_path), build("topk", 16, 64, k=4)
    seen: list[float] = []
    config = TrainConfig(epochs=1, batch_size=64, warmup=0.0, decay="none")
    train(sae, cache, config, progress=lambda metrics: seen.append(metrics.lr))
    assert set(seen) == {chosen_rate(sae, cache, config).value}


@pytest.mark.parametrize("lr", [0, -1.0, math.nan, math.inf, "fast", None])
def test_impossible_rates_are_refused(lr: object):
    with pytest.raises(UserError, match=r"lr=.* must be positive and finite, or auto"):
        TrainConfig(lr=lr)  # pyright: ignore[reportArgumentType]

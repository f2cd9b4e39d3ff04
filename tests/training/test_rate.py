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
from saelab.training.rate import Rate, automatic, published


def tiny_cache(folder: Path) -> ActivationCache:
    x = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
    return ActivationCache.from_tensors(folder / "cache", x, held_out=0.1)


def rate(d_sae: int, n_steps: int, batch_size: int, d_in: int = 576, k: float | None = 32) -> Rate:
    return automatic(d_sae, n_steps, batch_size, d_in=d_in, k=k)


def test_values_of_the_rule_by_hand():
    assert rate(4096, 500, 2048).value == pytest.approx(4.6e-3)
    assert rate(4096, 500, 2048, k=None) == rate(4096, 500, 2048)
    demo = rate(4608, 920, 2048)
    assert demo.value == pytest.approx(4.6e-3 * 1.84**-0.2 * 1.125**-0.45)
    assert "(920 steps / 500)^-0.2" in demo.why
    other = rate(8192, 250, 8192, d_in=2304, k=64)
    assert other.value == pytest.approx(4.6e-3 * 4**0.25 * 2**0.2 * 2**-0.45 * 2**0.4 * 4**-0.25)


def test_runs_smaller_than_any_measured_do_not_extrapolate_to_high_rates():
    least = rate(768, 100, 512, d_in=128, k=8)
    small = rate(64, 3, 512, d_in=16, k=1)
    assert small.value == least.value < 0.01
    assert "steps count as 100" in small.why and "active count as 8" in small.why and "count as" not in least.why
    assert rate(4096, 500, 2048, k=1000).value == rate(4096, 500, 2048, k=128).value


@pytest.mark.parametrize("batch_size", [131_072, 1_000_000])
def test_at_the_published_batch_the_published_rate_holds(batch_size: int):
    assert rate(2**16, 1000, batch_size).value == published(2**16) == pytest.approx(1e-4)


def test_between_the_two_batches_the_rate_falls_without_a_jump():
    batches = [8192, 16_384, 65_536, 131_071, 131_072]
    rates = [rate(2**14, 1000, batch).value for batch in batches]
    assert rates == sorted(rates, reverse=True)
    assert rate(2**14, 1000, 8191).value == pytest.approx(rates[0], rel=1e-3)
    assert rates[3] == pytest.approx(rates[4], rel=1e-3)
    middle = rate(2**14, 1000, 2**15).value  # half-way between 2^13 and 2^17 in the logarithm
    assert middle == pytest.approx(math.sqrt(rates[0] * rates[4]))


def test_long_runs_end_at_the_published_rate_and_not_below():
    assert rate(2**14, 10**9, 2048).value == published(2**14)


def test_variants_that_need_lower_rates_get_them(tmp_path: Path):
    x = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
    cache, given = ActivationCache.from_tensors(tmp_path, x, held_out=0.1), TrainConfig(epochs=1, batch_size=64)

    def of(variant: str, **options: object) -> float:
        return chosen_rate(build(variant, 16, 4096, k=8, **options), cache, given).value

    assert of("abs_topk") == of("batch_topk") == of("gradient_topk", signed=True) == of("topk")
    for variant in ("batch_topk", "mutual_choice", "feature_choice"):
        assert of(variant, signed=True) == pytest.approx(of("topk") / 3)
    assert chosen_rate(build("jump_relu", 16, 4096, l0=8), cache, given).value == pytest.approx(0.75 * of("topk"))
    assert "times 0.75 for this variant" in chosen_rate(build("jump_relu", 16, 4096, l0=8), cache, given).why


def test_activations_of_any_size_get_the_same_rate(tmp_path: Path):
    made = []
    for name, factor, offset in (("unit", 1.0, 0.0), ("thousands", 5000.0, 3.0)):
        x = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
        cache = ActivationCache.from_tensors(tmp_path / name, factor * (x + offset), held_out=0.1)
        variance = cache.manifest.variance * cache.manifest.scale**2
        assert 0.5 <= variance <= 2.0, "the trainer scales to unit variance, whatever the mean"
        made.append(chosen_rate(build("topk", 16, 64, k=4), cache, TrainConfig(epochs=1, batch_size=64)))
    assert made[0] == made[1]


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

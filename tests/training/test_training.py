"""The training loop: schedules, statistics, averages, refusals, and whether it finds a planted dictionary."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import saelab
from saelab.data.cache import ActivationCache
from saelab.distributed import SINGLE
from saelab.errors import UserError
from saelab.sae import VARIANTS, build
from saelab.sae.weights import load_sae
from saelab.training import Diverged, TrainConfig, check, fit_steps, n_steps, start, train, train_steps
from saelab.training.loop import run_steps
from saelab.training.schedule import learning_rate
from tests.devices import EVERY_DEVICE

D_IN, D_SAE = 16, 32


def planted(n: int, d_in: int = D_IN, d_sae: int = D_SAE, density: float = 0.06, seed: int = 0):
    """Activations that are sparse non-negative combinations of unit directions; returns them and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    active = torch.rand(n, d_sae, generator=generator) < density
    values = (1 + torch.rand(n, d_sae, generator=generator)) * active
    return 9 * values @ directions + torch.arange(d_in), directions


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    acts, _ = planted(1100)
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("train") / "cache", acts)


def sae_of(variant: str = "topk", seed: int = 0, **config):
    torch.manual_seed(seed)
    return build(variant, d_in=D_IN, d_sae=D_SAE, **({"k": 3} | config))


CONFIG = TrainConfig(epochs=2, batch_size=64, lr=3e-3, dead_after=128)


@EVERY_DEVICE
def test_it_finds_a_planted_dictionary(tmp_path: Path, device: str) -> None:
    acts, directions = planted(8_000, d_in=24, d_sae=32, density=0.05)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts)
    sae = build("topk", d_in=24, d_sae=48, k=3).to(device)
    metrics = list(train_steps(sae, cache, TrainConfig(epochs=8, batch_size=256, lr=8e-3)))
    assert metrics[-1].fvu < 0.1 < metrics[0].fvu
    assert metrics[-1].step == n_steps(cache, TrainConfig(epochs=8, batch_size=256)) == 8 * (7_600 // 256)
    best = (directions @ sae.W_dec.detach().cpu().T).max(dim=1).values
    assert (best > 0.9).float().mean() > 0.9

    # Outside the generator the SAE takes raw activations: its error there is the one it reported.
    held_out = torch.cat([batch.acts.to(device) for batch in cache.batches(100, split="held_out", seed=None)])
    with torch.no_grad():
        error = (held_out - sae(held_out)).square().sum(1).mean()
    assert error / cache.manifest.variance < 0.15
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48, device=device), atol=1e-6)
    assert not sae.training


@EVERY_DEVICE
def test_the_same_seed_gives_the_same_run(cache: ActivationCache, device: str) -> None:
    def run(config: TrainConfig, noise: int):
        sae = sae_of().to(device)
        torch.manual_seed(noise)  # what the caller does with the global generator is no business of the run
        return [m.row() for m in train_steps(sae, cache, config)], sae.state_dict()

    rows, weights = run(CONFIG, noise=1)
    again_rows, again = run(CONFIG, noise=2)
    assert rows == again_rows
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    other, _ = run(TrainConfig(epochs=2, batch_size=64, lr=3e-3, dead_after=128, data_seed=1), noise=1)
    assert other != rows


def test_randomness_inside_a_step_follows_seed_and_step_only(cache: ActivationCache) -> None:
    def draws(seed: int) -> list[float]:
        sae, seen = sae_of(), []
        sae.extra_losses = lambda x, code, error: seen.append(torch.rand(()).item()) or {}
        list(train_steps(sae, cache, TrainConfig(epochs=1, batch_size=256, seed=seed)))
        return seen

    before = torch.get_rng_state()
    first = draws(0)
    torch.set_rng_state(before)
    torch.rand(7)
    assert draws(0) == first != draws(1)
    assert len(set(first)) == len(first) == 4


@EVERY_DEVICE
def test_dead_latents_are_counted_in_tokens_and_revived(cache: ActivationCache, device: str) -> None:
    sae = sae_of().to(device)
    config = CONFIG.resolved(sae, cache)
    state = start(sae, cache, config)
    with torch.no_grad():
        sae.b_enc[:20] = -1e6
    metrics = list(itertools.islice(train_steps(sae, cache, config, state), 3))
    assert [m.dead for m in metrics] == [0, 0, 20]  # dead after more than 128 tokens: at 192
    assert "auxk" in metrics[2].terms and "auxk" not in metrics[1].terms
    assert int((state.tokens_since_fired > 128).sum()) == 20
    assert state.tokens_since_fired[:20].tolist() == [192] * 20


@pytest.mark.parametrize("name", ["k_aux", "dead_after"])
def test_a_step_takes_no_other_number_for_one_that_is_not_chosen(cache: ActivationCache, name: str) -> None:
    sae = sae_of()
    config = CONFIG.resolved(sae, cache)
    state = start(sae, cache, config)
    state.tokens_since_fired += 1000  # AuxK has latents to revive from the first step on
    with pytest.raises(ValueError, match=f"{name} depends on the run and is not filled in"):
        next(run_steps(sae, cache, replace(config, **{name: None}), state, None, SINGLE))


@EVERY_DEVICE
def test_the_first_steps_match_a_plain_dense_implementation(cache: ActivationCache, device: str) -> None:
    """Dense autograd in float64, Adam, norm constraint and clipping written out: same losses, same weights."""
    sae = sae_of().to(device)
    config = TrainConfig(epochs=1, batch_size=64, lr=1e-2, grad_clip=0.05, aux_weight=0.0).resolved(sae, cache)
    state = start(sae, cache, config)
    scale, variance = state.scale, cache.manifest.variance * state.scale**2
    W_enc, W_dec = (w.detach().double().requires_grad_() for w in (sae.W_enc, sae.W_dec))
    b_enc, b_dec = ((b.detach().double() * scale).requires_grad_() for b in (sae.b_enc, sae.b_dec))
    parameters = [W_dec, b_dec, W_enc, b_enc]
    adam = torch.optim.Adam(parameters, eps=6.25e-10)
    total = n_steps(cache, config)
    batches = [b.acts.to(device).double() * scale for b in itertools.islice(cache.batches(64, seed=0), 4)]
    expected, norms = [], []
    for step, x in enumerate(batches):
        pre = (x - b_dec) @ W_enc + b_enc
        kept = pre.topk(3, dim=1)
        recon = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu()) @ W_dec + b_dec
        loss = (x - recon).square().sum() / (64 * variance)
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            norm = math.sqrt(sum(p.grad.square().sum() for p in parameters))
            for p in parameters:
                p.grad *= min(1, 0.05 / norm)
        adam.param_groups[0]["lr"] = learning_rate(config, step, total)
        adam.step()
        expected.append(loss.item())
        norms.append(norm)
    generator = train_steps(sae, cache, config, state)
    got = list(itertools.islice(generator, 4))
    assert [m.loss for m in got] == pytest.approx(expected, rel=1e-5)
    assert [m.grad_norm for m in got] == pytest.approx(norms, rel=1e-4)
    # Adam divides by the gradient's own size: float32 noise of a small gradient shows at the size of one step.
    assert torch.allclose(sae.W_dec.double(), W_dec, atol=1e-3)
    assert torch.allclose(sae.W_enc.double(), W_enc, atol=1e-3)


def test_the_average_is_the_bias_corrected_mean_of_the_weights_before_each_step(cache: ActivationCache) -> None:
    config = TrainConfig(epochs=1, batch_size=128, ema=0.8, lr=1e-2).resolved(sae := sae_of(), cache)
    state = start(sae, cache, config)
    seen, generator = [sae.b_enc.detach().clone() * state.scale], train_steps(sae, cache, config, state)
    total = n_steps(cache, config)
    for metrics in generator:
        if metrics.step < total:
            seen.append(sae.b_enc.detach().clone())
    weights = torch.tensor([0.8 ** (total - 1 - i) for i in range(total)])
    mean = (weights[:, None] * torch.stack(seen)).sum(0) / weights.sum()
    assert torch.allclose(sae.b_enc * state.scale, mean, rtol=1e-4, atol=1e-8)


def test_schedules() -> None:
    config = TrainConfig(lr=1.0, warmup=0.1, decay="linear", decay_share=0.2)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    cosine = TrainConfig(lr=1.0, warmup=0, decay="cosine", decay_share=0.5)
    assert learning_rate(cosine, 75, 100) == pytest.approx(0.5)
    assert learning_rate(TrainConfig(lr=1.0, decay="none"), 99, 100) == 1.0


def test_k_warms_up_and_ends_where_it_was_configured(cache: ActivationCache) -> None:
    sae = sae_of(k=2, k_warmup=0.5)
    l0 = [m.l0 for m in train_steps(sae, cache, TrainConfig(epochs=1, batch_size=64, aux_weight=0.0))]
    assert l0[0] > 4 and l0[-1] <= 2 and sae.k == 2 == sae.config["k"]
    assert sae.k_start == 8
    for step, k in [(0, 8), (4, 5), (8, 2), (15, 2)]:
        sae.train().schedule(step, 16)
        assert sae.budget == k and sae.k == 2
    sae.schedule(0, 16)
    assert sae.eval().budget == 2


def test_a_fractional_budget_survives_its_warm_up(tmp_path: Path) -> None:
    """It is what the last steps spend and what the threshold is fitted to."""
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(2000, D_IN))
    sae = sae_of("batch_topk", k=2.5, k_warmup=0.5)
    l0 = [m.l0 for m in train_steps(sae, cache, TrainConfig(epochs=2, batch_size=128, aux_weight=0.0))]
    assert l0[0] > 4 and l0[-1] == pytest.approx(2.5, abs=0.01)
    assert sae.train().budget == 2.5
    rows = torch.cat([b.acts for b in cache.batches(100, split="train", seed=None)])
    assert sae.eval().encode(rows).l0().double().mean().item() == pytest.approx(2.5, abs=0.01)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_beta_ends_at_its_value(tmp_path: Path, share: float) -> None:
    acts = torch.randn(600, D_IN)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, grads=torch.randn(600, D_IN))
    sae = sae_of("gradient_topk", beta=0.7, beta_warmup=share)
    for step, beta in ((0, 0.0), (4, 0.7 * 4 / (share * 16)), (16, 0.7)):
        sae.train().schedule(step, 16)
        assert sae._beta() == pytest.approx(beta)
    train(sae, cache, TrainConfig(epochs=1, batch_size=64))
    assert sae.beta == 0.7 == sae.train()._beta() and sae.config["beta_warmup"] == share
    with pytest.raises(UserError, match="beta=inf cannot rise from 0"):
        sae_of("gradient_topk", beta=math.inf, beta_warmup=share)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_bf16_keeps_weights_statistics_and_codes_in_fp32(tmp_path: Path, variant: str) -> None:
    acts, _ = planted(700)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, grads=0.01 * torch.randn(acts.shape))
    last = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        sae = build(variant, d_in=D_IN, d_sae=D_SAE, l0=3)
        config = TrainConfig(epochs=2, batch_size=64, lr=3e-3, precision=precision, dead_after=128)
        last[precision] = list(train_steps(sae, cache, config))[-1]
        assert all(value.dtype in (torch.float32, torch.float64, torch.int64) for value in sae.state_dict().values())
    # Rounding may swap latents whose pre-activations are nearly equal; what is decoded is as exact as before.
    assert last["bf16"].fvu == pytest.approx(last["fp32"].fvu, rel=0.01)
    assert last["bf16"].l0 == pytest.approx(last["fp32"].l0, rel=0.05)


def test_auto_is_recorded_as_what_it_comes_to(cache: ActivationCache) -> None:
    assert TrainConfig().precision == "auto" and TrainConfig().resolved(sae_of(), cache).precision == "fp32"
    assert TrainConfig(precision="bf16").resolved(sae_of(), cache).precision == "bf16"


def test_a_diverging_run_stops_and_names_the_step(cache: ActivationCache) -> None:
    sae = sae_of()
    config = CONFIG.resolved(sae, cache)
    generator = train_steps(sae, cache, config)
    next(generator)
    with torch.no_grad():
        sae.b_dec[0] = math.nan
    with pytest.raises(Diverged, match=r"loss is not finite at step 2 .*lower lr=0.003"):
        next(generator)
    assert not sae.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"lr": math.nan}, "lr=nan must be positive"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0 must be positive"),
        ({"warmup": 0.9, "decay_share": 0.2}, "add up to at most 1"),
        ({"ema": 1.0}, "strictly between 0 and 1"),
        ({"warmup": 1.5}, "between 0 and 1"),
        ({"k_aux": 0}, "k_aux=0 must be at least 1"),
        ({"dead_after": 0}, "dead_after=0 must be at least 1"),
        ({"decay": "exponential"}, "decay='exponential' is not one of none, linear, cosine"),
        ({"freeze": "dictionary"}, "freeze='dictionary' is not one of none, decoder, encoder"),
    ],
)
def test_impossible_settings_are_refused(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes)


def test_runs_that_cannot_work_are_refused_before_they_start(cache: ActivationCache) -> None:
    with pytest.raises(UserError, match="batch_size=4096 exceeds the 1045 training rows"):
        check(sae_of(), cache, TrainConfig(batch_size=4096))
    with pytest.raises(UserError, match="d_in=8 but the cache holds width 16"):
        check(build("topk", d_in=8, d_sae=32, k=2), cache, CONFIG)
    with pytest.raises(UserError, match="variant 'topk' has no option 'beta_warmup'"):
        sae_of(beta_warmup=0.1)
    with pytest.raises(UserError, match=r"k_start=99 is outside 1..d_sae=32"):
        sae_of(k_start=99, k_warmup=0.1)
    with pytest.raises(UserError, match=r"k_warmup=1.5 is a share of the run, between 0 and 1"):
        sae_of(k_warmup=1.5)


def test_train_runs_to_the_end_and_fills_a_folder_where_one_is_named(cache: ActivationCache, tmp_path: Path) -> None:
    by_steps = sae_of()
    rows = [metrics.row() for metrics in train_steps(by_steps, cache, CONFIG)]
    in_memory, seen = sae_of(), []
    last = saelab.train(in_memory, cache, CONFIG, progress=seen.append)
    assert last is not None and last.row() == rows[-1] and [metrics.row() for metrics in seen] == rows
    on_disk = train(sae_of(), cache, CONFIG, tmp_path / "run", metadata={"model_name": "toy"})
    assert on_disk == last
    loaded = load_sae(tmp_path / "run")
    for name, value in by_steps.state_dict().items():
        assert torch.equal(value, in_memory.state_dict()[name]) and torch.equal(value, loaded.state_dict()[name]), name
    with pytest.raises(UserError, match="holds a finished run"):
        train(sae_of(), cache, CONFIG, tmp_path / "run")
    with pytest.raises(UserError, match=r"resume=True needs the folder .*give out"):
        train(sae_of(), cache, CONFIG, resume=True)


def test_a_run_that_cannot_work_is_refused_when_it_is_made(cache: ActivationCache, tmp_path: Path) -> None:
    """Not at the first step, which a caller who forgets to iterate never takes."""
    narrow = build("topk", d_in=8, d_sae=32, k=2)
    with pytest.raises(UserError, match="d_in=8 but the cache holds width 16"):
        train_steps(narrow, cache, CONFIG)
    with pytest.raises(UserError, match="d_in=8 but the cache holds width 16"):
        fit_steps(narrow, cache, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batches", [0, 3])
def test_a_stream_that_ends_early_is_no_run(cache: ActivationCache, batches: int) -> None:
    """An empty one, too: the batches of the cache must not stand in for it."""
    stream = list(itertools.islice(cache.batches(64, split="train", drop_last=True), batches))
    with pytest.raises(UserError, match=rf"the stream ended after step {batches} of 32"):
        list(train_steps(sae_of(), cache, CONFIG, stream=stream))

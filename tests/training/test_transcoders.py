"""SAEs whose target is another place: planted maps are recovered, and nothing depends on the units of either side."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from saelab import kernels
from saelab.comparison import match_saes
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import evaluate, shared_with_seeds
from saelab.sae import VARIANTS, build
from saelab.sae.weights import load_sae, save
from saelab.training import TrainConfig, fit_steps, train

D, D_OUT, N, K = 32, 24, 4000, 3
BUDGETS = ["topk", "abs_topk", "batch_topk", "mutual_choice", "feature_choice", "gradient_topk", "matryoshka"]


def planted(d_out=D_OUT, n=N, mean=2.0, nonlinear=True):
    """``x = code @ A + mean``, ``y = code @ B``: orthonormal A, random unit B, K active of D features."""
    generator = torch.Generator().manual_seed(1)
    A = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    B = F.normalize(torch.randn(D, d_out, generator=generator), dim=1)
    code = torch.zeros(n, D)
    code.scatter_(1, torch.rand(n, D, generator=generator).topk(K).indices, 0.5 + torch.rand(n, K, generator=generator))
    return A, B, code @ A + mean * torch.randn(D, generator=generator), 5.0 * code @ B


def paired(folder, x, y, grads=None):
    target = ActivationCache.from_tensors(folder / "y", y, grads=grads, held_out=0.2)
    return ActivationCache.from_tensors(folder / "x", x, held_out=0.2).with_target(target)


def best_cosines(planted, found):
    return (F.normalize(planted, dim=1) @ F.normalize(found.detach(), dim=1).T).amax(1).mean().item()


def options(variant):
    return {"l0": K} if variant in ("jump_relu", "relu") else {"k": K}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    A, B, x, y = planted(d_out=D)
    return A, B, paired(tmp_path_factory.mktemp("planted"), x, y)


def test_both_dictionaries_of_a_planted_map_are_recovered(world):
    A, B, cache = world
    sae = build("topk", D, 2 * D, d_out=D, k=K)
    train(sae, cache, TrainConfig(epochs=12, batch_size=128, lr=4e-3))
    assert best_cosines(A, sae.W_enc.T) >= 0.95
    assert best_cosines(B, sae.W_dec) >= 0.95
    assert evaluate(sae, cache)["fvu"] < 0.05


@pytest.mark.parametrize("variant", [*BUDGETS, "jump_relu", "relu", "gated"])
@pytest.mark.parametrize("skip", [False, True])
def test_every_variant_with_an_encoder_trains_on_a_target(variant, skip, tmp_path):
    _, _, x, y = planted(n=1200)
    cache = paired(tmp_path, x, y, grads=torch.randn(len(y), D_OUT))
    sae = build(variant, D, 48, d_out=D_OUT, skip=skip, **({} if variant == "gated" else options(variant)))
    last = train(sae, cache, TrainConfig(epochs=6, batch_size=128, lr=3e-3))
    assert last is not None
    measured = evaluate(sae, cache)
    assert measured["fvu"] < 1.0
    save(sae, tmp_path / "run", {"hook_name": "a", "hook_name_out": "b"})
    again = load_sae(tmp_path / "run")
    probe = x[:64]
    assert torch.equal(again(probe), sae(probe))
    # The plain formula, without anything of ours but the code.
    code = again.encode(probe)
    plain = code.dense() @ again.W_dec + again.b_dec
    plain = plain + probe @ again.W_skip.T if skip else plain
    assert (again(probe) - plain).norm() <= 1e-5 * plain.norm()


def test_a_skip_connection_is_never_worse(world):
    cache, found = world[2], {}
    for skip in (False, True):
        torch.manual_seed(0)
        sae = build("topk", D, 24, d_out=D, k=2, skip=skip)
        train(sae, cache, TrainConfig(epochs=6, batch_size=256, lr=3e-3))
        found[skip] = evaluate(sae, cache)["fvu"]
    assert found[True] <= found[False]


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("d_out", [D, D_OUT])
def test_gradients_equal_those_of_autograd_in_float64(backend, d_out, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", backend)
    torch.manual_seed(0)
    sae = build("topk", D, 40, d_out=d_out, skip=True, k=4)
    sae.centre_on(torch.randn(D))
    x, y = torch.randn(20, D), torch.randn(20, d_out)
    oracle = copy.deepcopy(sae).double()
    selected = sae.select(x, None)
    wanted = sae.to_decode(x, y)
    parts = kernels.reconstruct(x, (sae.W_enc, sae.b_enc, sae.b_in), (sae.W_dec, sae.b_dec), selected, target=wanted)
    parts[0].sum().backward()
    rows = torch.arange(20).repeat_interleave(selected.row_ptr.diff())
    mask = torch.zeros(20, 40, dtype=torch.float64).index_put((rows, selected.indices), (selected.values > 0).double())
    centred = x.double() - oracle.centre
    z = (centred @ oracle.W_enc + oracle.b_enc) * mask
    error = z @ oracle.W_dec + oracle.b_dec + centred @ oracle.W_skip.T - y.double()
    error.square().sum().backward()
    for name, parameter in oracle.named_parameters():
        ours = dict(sae.named_parameters())[name].grad
        assert ours is not None
        assert (ours - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("skip", [False, True])
def test_units_and_offset_of_the_input_change_nothing(skip, tmp_path):
    """A power of two on either side, and a shift of the input, give the same reconstruction in these units."""
    _, _, x, y = planted(n=1200, mean=0.0)
    recon = []
    for name, scale, out, shift in (("a", 1.0, 1.0, 0.0), ("b", 16.0, 0.25, 0.0), ("c", 1.0, 1.0, 3.0)):
        cache = paired(tmp_path / name, scale * x + shift, out * y)
        torch.manual_seed(0)
        sae = build("topk", D, 48, d_out=D_OUT, k=K, skip=skip)
        train(sae, cache, TrainConfig(epochs=2, batch_size=128, lr=3e-3))
        recon.append(sae(scale * x[:100] + shift) / out)
    assert (recon[1] - recon[0]).norm() <= 1e-4 * recon[0].norm()
    # A shift changes the rounding of the input, which a selection may turn into another latent.
    close = (recon[2] - recon[0]).norm(dim=1) <= 1e-2 * recon[0].norm(dim=1)
    assert close.float().mean() >= 0.9


def test_an_sae_is_a_transcoder_onto_its_own_input(tmp_path):
    """With the target equal to the input the start is the tied one, and training goes as well."""
    _, _, x, _ = planted(n=2000, mean=0.0)
    cache = paired(tmp_path, x, x)
    sae = build("topk", D, 48, d_out=D, k=K)
    sae.initialise(x, x.mean(0))
    sae.initialise_map(x, x)
    assert torch.allclose(sae.W_dec, sae.W_enc.T, atol=1e-5)
    plain = build("topk", D, 48, k=K)
    config = TrainConfig(epochs=4, batch_size=128, lr=3e-3)
    train(sae, cache, config)
    own = ActivationCache(tmp_path / "x")
    train(plain, own, config)
    assert evaluate(sae, cache)["fvu"] <= 1.1 * evaluate(plain, own)["fvu"]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    _, _, x, y = planted(n=1200)
    cache, config = paired(tmp_path, x, y), TrainConfig(epochs=4, batch_size=128, lr=3e-3)

    def fresh():
        torch.manual_seed(0)
        return build("batch_topk", D, 48, d_out=D_OUT, skip=True, k=K)

    for _ in fit_steps(fresh(), cache, config, tmp_path / "whole"):
        pass
    steps = fit_steps(fresh(), cache, config, tmp_path / "cut", checkpoint_steps=7)
    for _ in range(10):
        next(steps)
    steps.close()
    for _ in fit_steps(fresh(), cache, config, tmp_path / "cut", resume=True):
        pass
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_run_is_not_resumed_with_another_target(tmp_path):
    _, _, x, y = planted(n=1200)
    config = TrainConfig(epochs=1, batch_size=128, lr=3e-3)
    steps = fit_steps(build("topk", D, 48, d_out=D_OUT, k=K), paired(tmp_path, x, y), config, tmp_path / "run")
    next(steps)
    steps.close()
    other = ActivationCache(tmp_path / "x").with_target(
        ActivationCache.from_tensors(tmp_path / "z", 2 * y, held_out=0.2)
    )
    with pytest.raises(UserError, match=r"was begun with .*/y as its target, not .*/z"):
        list(fit_steps(build("topk", D, 48, d_out=D_OUT, k=K), other, config, tmp_path / "run", resume=True))


def test_a_trained_transcoder_is_fine_tuned_without_a_jump(world):
    cache = world[2]
    sae = build("topk", D, 48, d_out=D, k=K, skip=True)
    train(sae, cache, TrainConfig(epochs=4, batch_size=256, lr=3e-3))
    before = evaluate(sae, cache)["fvu"]
    assert not sae.centre.any()
    train(sae, cache, TrainConfig(epochs=1, batch_size=256, lr=1e-5), source="itself")
    assert evaluate(sae, cache)["fvu"] <= before + 0.01


def test_refusals(tmp_path):
    _, _, x, y = planted(n=400)
    cache = paired(tmp_path, x, y)
    plain = ActivationCache(tmp_path / "x")
    config = TrainConfig(epochs=1, batch_size=64)
    with pytest.raises(UserError, match="encoder and its decoder are one dictionary"):
        build("matching_pursuit", D, 48, d_out=D_OUT)
    with pytest.raises(UserError, match="skip is a connection to a target"):
        build("topk", D, 48, skip=True)
    with pytest.raises(UserError, match="match_norm"):
        build("topk", D, 48, d_out=D_OUT, match_norm=True)
    with pytest.raises(UserError, match="has no target"):
        train(build("topk", D, 48, d_out=D_OUT, k=K), plain, config)
    with pytest.raises(UserError, match=f"build it with d_out={D_OUT}"):
        train(build("topk", D, 48, k=K), cache, config)
    with pytest.raises(UserError, match=f"writes width d_out=7 but the target .* has width {D_OUT}"):
        train(build("topk", D, 48, d_out=7, k=K), cache, config)
    with pytest.raises(UserError, match="the cache has none"):
        train(build("gradient_topk", D, 48, d_out=D_OUT, k=K), cache, config)
    with pytest.raises(UserError, match="is both the input and the target"):
        plain.with_target(plain)


def test_latents_of_two_spaces_are_not_compared():
    sae, transcoder = build("topk", D, 48, k=K), build("topk", D, 48, d_out=D, k=K)
    with pytest.raises(UserError, match="onto the same target only"):
        match_saes(sae, transcoder)
    with pytest.raises(UserError, match=r"a transcoder of d_in=\d+, d_out=\d+ and an SAE of d_in=\d+ share no latents"):
        shared_with_seeds(transcoder, [sae])


def test_caches_of_two_harvests_are_refused(tmp_path):
    _, _, x, y = planted(n=400)
    tokens = torch.arange(400) % 7
    ActivationCache.from_tensors(tmp_path / "x", x, tokens, model="a")
    for name, of, given, why in (
        ("model", y, {"model": "b"}, "model is 'a' of one and 'b' of the other"),
        ("fewer", y[:390], {"model": "a", "tokens": tokens[:390]}, "held_out_from|n_rows"),
        ("other", y, {"model": "a", "tokens": tokens.flip(0)}, "text of shard_00000.safetensors differ"),
    ):
        other = ActivationCache.from_tensors(tmp_path / name, of, **{"tokens": tokens, **given})
        with pytest.raises(UserError, match=f"not of one harvest: .*({why})"):
            ActivationCache(tmp_path / "x").with_target(other)


def test_the_target_reaches_every_way_of_reading(tmp_path):
    _, _, x, y = planted(n=400)
    cache = paired(tmp_path, x, y, grads=y.neg())
    batch = next(cache.batches(50, seed=3, grads=True))
    for found in (batch, cache.read(batch.rows, grads=True), next(cache.head(9, 5, grads=True))):
        assert torch.equal(found.acts, x[found.rows])
        assert torch.equal(found.target, y[found.rows])
        assert torch.equal(found.grads, -y[found.rows])


def test_variants_without_a_target_say_why():
    for name, cls in VARIANTS.items():
        assert name == "matching_pursuit" or "d_out" in cls.__signature__.parameters

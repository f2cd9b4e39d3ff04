"""What every variant of the registry must do; a new one is tested here by being registered."""

from __future__ import annotations

import copy
import inspect
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import SAE, VARIANTS, LinearSAE, build
from saelab.sae.weights import load_sae, save
from saelab.sparse import SparseCode
from saelab.training import TrainConfig, n_steps, start, train_steps
from saelab.training.state import make_optimizer
from tests.devices import EVERY_DEVICE

D_IN, D_SAE, N = 8, 20, 24
SMALL = {"k": 3, "n_steps": 3, "target_l0": 3.0, "bandwidth": 0.5}  # options that depend on the size of the toy
# Options that change what is selected or kept, besides every variant's defaults.
OPTIONS: dict[str, tuple[str, dict]] = {
    "batch_topk-signed": ("batch_topk", {"signed": True}),
    "feature_choice-signed": ("feature_choice", {"signed": True}),
    "gradient_topk-eval": ("gradient_topk", {"grad_select": "train_and_eval"}),
    "gradient_topk-raw": ("gradient_topk", {"grad_select": "train_and_eval", "grad_norm": "none"}),
    "matching_pursuit-stop": ("matching_pursuit", {"residual_stop": 0.3}),
}
every_variant = pytest.mark.parametrize("name", [*sorted(VARIANTS), *OPTIONS])


def small(name: str, d_in: int = D_IN, d_sae: int = D_SAE, device: str = "cpu", **config) -> SAE:
    """A toy of the variant with parameters in general position."""
    name, fixed = OPTIONS.get(name, (name, {}))
    config = fixed | config
    options = inspect.signature(VARIANTS[name]).parameters
    sae = build(name, d_in, d_sae, **{key: SMALL[key] for key in SMALL if key in options} | config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape))
    return sae.to(device)


def data(n: int = N, d_in: int = D_IN, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Activations and gradients. One token is zero, two are equal."""
    x, grads = torch.randn(n, d_in), torch.randn(n, d_in)
    x[0], x[2] = 0, x[1]
    return x.to(device), grads.to(device)


def tiny_cache(folder: Path, n: int = 700) -> ActivationCache:
    atoms = torch.randn(12, D_IN)
    acts = (torch.rand(n, 12) * (torch.rand(n, 12) < 0.2)) @ atoms + 0.5
    return ActivationCache.from_tensors(folder, 3 * acts, grads=torch.randn(n, D_IN), held_out=0.2)


def assert_well_formed(code: SparseCode, signed: bool) -> None:
    assert code.row_ptr[0] == 0 and code.row_ptr[-1] == code.values.numel() == code.indices.numel()
    assert (code.counts() >= 0).all()
    assert ((code.indices >= 0) & (code.indices < code.d_sae)).all()
    cells = code.rows() * code.d_sae + code.indices
    assert cells.unique().numel() == cells.numel(), "a latent appears twice in a row"
    assert code.values.isfinite().all()
    assert signed or (code.values >= 0).all()


@EVERY_DEVICE
@every_variant
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_code_is_well_formed(name: str, mode: str, device: str) -> None:
    sae = small(name, device=device).train()
    x, grads = data(device=device)
    sae.observe(x, sae.encode(x, grads), grads)  # what inference needs is measured in training
    sae.train(mode == "train")
    code = sae.encode(x, grads)
    assert (code.n, code.d_sae) == (N, D_SAE)
    assert_well_formed(code, sae.signed)
    assert_well_formed(sae.encode(x[:1], grads[:1]), sae.signed)


@EVERY_DEVICE
@every_variant
def test_budget_is_kept(name: str, device: str) -> None:
    sae = small(name, device=device).train()
    budget = sae.config.get("k") or sae.config.get("n_steps")
    l0 = sae.encode(*data(device=device)).l0()
    assert l0.sum() > 0
    if budget is not None:
        assert l0.sum() <= budget * N


@EVERY_DEVICE
@every_variant
def test_decode_is_the_dense_product(name: str, device: str) -> None:
    sae = small(name, device=device).double()
    x, grads = data(device=device)
    code = sae.encode(x.double(), grads.double())
    torch.testing.assert_close(sae.decode(code), code.dense() @ sae.W_dec + sae.b_dec)


@EVERY_DEVICE
@every_variant
def test_gradients_reach_every_parameter(name: str, device: str) -> None:
    sae = small(name, device=device).train()
    for _ in range(2):  # penalties may start from zero
        x, grads = data(device=device)
        code = sae.encode(x, grads)
        objective, recon = sae.reconstruction_loss(x, code)
        sae.observe(x, code, grads)
        (objective + sum(sae.extra_losses(x, code, x - recon).values())).backward()
        sae.after_step(1, 2)
    for key, parameter in sae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, f"{key} is not trained"


@EVERY_DEVICE
@pytest.mark.parametrize("name", sorted(name for name, cls in VARIANTS.items() if issubclass(cls, LinearSAE)))
def test_gradients_match_dense_autograd(name: str, device: str) -> None:
    """Selection passes no gradient; the selected values do, unless they were clipped to zero."""
    sae = small(name, device=device).double().train()
    if sae.activate.__func__ is not LinearSAE.activate or type(sae).reconstruction_loss is not SAE.reconstruction_loss:
        pytest.skip("the variant's own test has the oracle of its objective")
    with torch.no_grad():
        sae.W_enc[:, 4] = sae.W_enc[:, 3]  # ties
        sae.b_enc[4] = sae.b_enc[3]
        sae.b_enc -= 0.6  # rows with fewer than k positives
    x, grads = (t.double() for t in data(device=device))
    x.requires_grad_()
    code = sae.encode(x, grads)
    sae.reconstruction_loss(x, code)[0].backward()
    found = {key: p.grad.clone() for key, p in sae.named_parameters()} | {"x": x.grad.clone()}
    if not sae.signed:
        assert (code.values == 0).any() or (code.l0() < SMALL["k"]).any(), "the adversarial rows are missing"

    sae.zero_grad()
    x.grad = None
    mask = (code.dense() != 0).detach()
    acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * mask
    (x - acts @ sae.W_dec - sae.b_dec).square().sum().backward()
    for key, parameter in [*sae.named_parameters(), ("x", x)]:
        torch.testing.assert_close(found[key], parameter.grad, msg=lambda m, key=key: f"{key}: {m}")


@every_variant
def test_eval_code_does_not_depend_on_neighbours(name: str, tmp_path: Path) -> None:
    sae = small(name)
    for _ in train_steps(sae, tiny_cache(tmp_path), TrainConfig(epochs=1, batch_size=64)):
        pass
    assert not sae.training
    x, grads = data()
    x *= 4
    others = torch.cat([x[:3], 5 * torch.randn(N - 3, D_IN)])
    alone, among, elsewhere = sae.encode(x[:3], grads[:3]), sae.encode(x, grads)[:3], sae.encode(others, grads)[:3]
    assert among.l0().sum() > 0
    for code in (among, elsewhere):
        torch.testing.assert_close(alone.dense(), code.dense(), rtol=1e-5, atol=1e-5)


@every_variant
def test_rescaling_by_a_power_of_two_is_exact(name: str, tmp_path: Path) -> None:
    sae = small(name)
    for _ in islice(train_steps(sae, tiny_cache(tmp_path), TrainConfig(epochs=1, batch_size=64)), 4):
        pass
    x, grads = data()
    code, recon = sae.encode(x, grads), sae(x, grads)
    sae.rescale_(0.125)
    scaled = sae.encode(0.125 * x, 8 * grads)
    assert torch.equal(0.125 * code.values, scaled.values) and torch.equal(code.indices, scaled.indices)
    assert torch.equal(0.125 * recon, sae(0.125 * x, 8 * grads))


@every_variant
def test_checkpoint_round_trip_is_bit_exact(name: str, tmp_path: Path) -> None:
    sae = small(name)
    for _ in train_steps(sae, tiny_cache(tmp_path / "cache"), TrainConfig(epochs=1, batch_size=64)):
        pass
    save(sae, tmp_path / "run")
    loaded = load_sae(tmp_path / "run")
    assert type(loaded) is type(sae) and loaded.config == sae.config == json.loads(json.dumps(sae.config))
    for key, value in sae.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]) and value.dtype == loaded.state_dict()[key].dtype, key
    x, grads = data()
    assert torch.equal(sae(x, grads), loaded(x, grads))


@EVERY_DEVICE
@every_variant
def test_training_lowers_fvu(name: str, tmp_path: Path, device: str) -> None:
    cache = tiny_cache(tmp_path)
    steps = list(
        train_steps(small(name, device=device), cache, TrainConfig(epochs=12, batch_size=64, lr=5e-3, dead_after=300))
    )
    assert all(torch.tensor([s.loss, s.fvu, s.grad_norm]).isfinite().all() for s in steps)
    assert steps[-1].fvu < 0.6 * steps[0].fvu
    assert steps[-1].l0 > 0


@EVERY_DEVICE
@every_variant
def test_resume_is_bit_exact(name: str, tmp_path: Path, device: str) -> None:
    cache, config = tiny_cache(tmp_path), TrainConfig(epochs=3, batch_size=64, lr=5e-3, dead_after=128)
    sae = small(name, device=device)
    whole, first = copy.deepcopy(sae), copy.deepcopy(sae)
    log = list(train_steps(whole, cache, config))

    config = config.resolved(first, cache)
    half = n_steps(cache, config) // 2 + 2  # past the middle, where phases change
    state = start(first, cache, config)
    run = train_steps(first, cache, config, state)
    first_rows = [step.row() for step in islice(run, half)]
    run.close()
    second = build(sae.variant, **sae.config).to(device)
    second.load_state_dict(first.state_dict())
    saved, state.optimizer = state.optimizer.state_dict(), make_optimizer(second)
    state.optimizer.load_state_dict(copy.deepcopy(saved))
    rows = first_rows + [step.row() for step in train_steps(second, cache, config, state)]

    assert rows == [step.row() for step in log]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_options_are_documented_for_the_command_line(name: str) -> None:
    from saelab.cli.variants import option_fields  # the command line needs packages that the SAEs do not

    for option, annotation, _ in option_fields(name):
        assert annotation.__metadata__[0].help, f"{name}: {option} has no line under Args:"


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_budget_wider_than_the_dictionary_is_refused(name: str) -> None:
    if "k" not in inspect.signature(VARIANTS[name]).parameters:
        pytest.skip("the variant has no budget")
    with pytest.raises(UserError, match=r"k=33 .*d_sae=32"):
        build(name, d_in=4, d_sae=32, k=33)

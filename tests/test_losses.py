"""Losses against their formulas, written out densely in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from saelab import kernels, losses
from saelab.kernels import products, subset
from saelab.kernels.dispatch import obstacle
from saelab.sae import LinearSAE, build

D_IN, D_SAE, N = 6, 30, 50


def sae_and_error(name: str, **config) -> tuple[LinearSAE, Tensor, Tensor]:
    sae = build(name, D_IN, D_SAE, k=3, **config).double()
    assert isinstance(sae, LinearSAE)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    x = torch.randn(N, D_IN, dtype=torch.float64)
    return sae, x, x - sae(x)


def naive_auxk(sae: LinearSAE, x: Tensor, error: Tensor, dead: Tensor, k_aux: int, through: bool = False) -> Tensor:
    """As in the reference trainer: the dead pre-activations, the rest masked out, dense."""
    b_in = sae.b_dec.detach() if sae.b_in is not None else 0.0
    u = (x - b_in) @ sae.W_enc + sae.b_enc
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[dead] = True
    key = (u.abs() if sae.signed else u).masked_fill(~mask, -torch.inf)
    chosen = torch.zeros_like(u).scatter(1, key.topk(k_aux).indices, 1.0)
    acts = u * chosen if sae.signed else (u * chosen).relu()
    if through:
        acts = u * chosen - ((u * chosen).detach() - acts.detach())  # the values of the code, the gradient of u
    target = error.detach()
    return ((acts @ sae.W_dec - target).square().mean()) / (target - target.mean(0)).square().mean()


@pytest.mark.parametrize(
    ("name", "config"), [("topk", {}), ("abs_topk", {}), ("abs_topk", {"apply_b_dec_to_input": False})]
)
@pytest.mark.parametrize(("k_aux", "through"), [(1, False), (4, False), (1, True), (4, True)])
def test_auxk_and_its_gradient(name: str, config: dict, k_aux: int, through: bool) -> None:
    sae, x, error = sae_and_error(name, **config)
    dead = torch.tensor([1, 4, 5, 11, 17, 29])
    loss = losses.auxk(sae, x, error, dead, k_aux, through)
    loss.backward()
    found = {key: None if p.grad is None else p.grad.clone() for key, p in sae.named_parameters()}
    sae.zero_grad()
    expected = naive_auxk(sae, x, error, dead, k_aux, through)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert found.pop("b_dec") is None, "the residual has no bias: the loss may not move it"
    for key, grad in found.items():
        torch.testing.assert_close(grad, sae.get_parameter(key).grad)
        untouched = torch.ones(D_SAE, dtype=torch.bool)
        untouched[dead] = False
        rows = grad.T if key == "W_enc" else grad
        assert (rows[untouched] == 0).all(), f"{key} of live latents is trained by AuxK"


def test_a_latent_that_is_negative_everywhere_has_a_gradient_straight_through() -> None:
    """Upwards where its direction would explain the residual, none in the paper's form; its decoder row stays."""
    sae, x, error = sae_and_error("topk")
    dead = torch.tensor([1, 4])
    with torch.no_grad():
        sae.b_enc[dead] = -100.0
    rows = losses.Subset.copied(sae, dead)
    loss = losses.auxk(sae, x, error, rows, 2, through=True)
    loss.backward()
    assert rows.W_enc.grad is not None and rows.b_enc.grad is not None and rows.W_dec.grad is not None
    wanted = -2 * (error @ sae.W_dec[dead].T) / (error - error.mean(0)).square().sum()
    torch.testing.assert_close(rows.b_enc.grad, wanted.sum(0).detach())
    torch.testing.assert_close(rows.W_enc.grad, (wanted.T @ (x - sae.b_dec)).detach())
    assert (rows.W_dec.grad == 0).all()
    stopped = losses.Subset.copied(sae, dead)
    same = losses.auxk(sae, x, error, stopped, 2)
    same.backward()
    assert same == loss and (stopped.b_enc.grad == 0).all()  # pyright: ignore[reportOptionalMemberAccess]


def test_auxk_takes_what_there_is_and_survives_a_perfect_reconstruction() -> None:
    sae, x, error = sae_and_error("topk")
    assert losses.auxk(sae, x, error, torch.tensor([3]), k_aux=512).isfinite()
    zero = losses.auxk(sae, x, torch.zeros_like(x), torch.tensor([3]), k_aux=1)
    assert zero == 0


def test_fvu_of_the_mean_is_one_and_of_the_data_zero() -> None:
    x = 5 + torch.randn(100, 4)
    assert losses.fvu(x, x.mean(0).expand_as(x)).item() == pytest.approx(1)
    assert losses.fvu(x, x) == 0
    recon = x + 0.1
    assert losses.fvu(x, recon).item() == pytest.approx(100 * 4 * 0.01 / ((x - x.mean(0)) ** 2).sum().item(), rel=1e-4)


def test_geometric_median_minimises_the_summed_distance() -> None:
    x = torch.cat([torch.randn(60, 3), 40 + torch.randn(15, 3)]).double()

    def cost(point) -> float:
        return (x - torch.as_tensor(point)).norm(dim=1).sum().item()

    best = minimize(cost, x.mean(0).numpy(), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9}).x
    torch.testing.assert_close(losses.geometric_median(x, 1000, 1e-9), torch.as_tensor(best), atol=1e-4, rtol=0)
    assert losses.geometric_median(torch.ones(5, 2)).tolist() == [1, 1]  # the start is the answer, at distance 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_auxk_does_not_hide_broken_weights(value: float) -> None:
    sae = build("topk", d_in=6, d_sae=10, k=2)
    assert isinstance(sae, LinearSAE)
    latents, x = torch.arange(3), torch.randn(8, 6)
    with torch.no_grad():
        sae.W_dec[latents] = value
    assert not losses.auxk(sae, x, torch.randn(8, 6), latents, 3).isfinite()


def noisy(name: str, **config) -> tuple[LinearSAE, Tensor, Tensor]:
    """A float32 SAE, activations and a residual."""
    sae, x, error = sae_and_error(name, **config)
    return sae.float(), x.float(), error.float()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("backend", ["numba", "reference", "triton"])
@pytest.mark.parametrize("k_aux", [2, 5, 64])
@pytest.mark.parametrize(("name", "through"), [("topk", False), ("topk", True), ("abs_topk", True)])
def test_dense_and_sparse_forms_of_auxk_give_the_float64_loss(
    backend: str, k_aux: int, name: str, through: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On copies of the rows, whose gradients are then added to those that the SAE has already."""
    monkeypatch.setattr(subset, "CHUNK_BYTES", 0)  # many chunks of tokens
    monkeypatch.setattr(products, "MIN_ROWS", 7)
    if obstacle(backend, "cpu") is not None:
        pytest.skip(str(obstacle(backend, "cpu")))
    sae, x, error = noisy(name)
    dead = torch.tensor([1, 4, 5, 11, 17, 29])
    before = {key: torch.randn(p.shape) for key, p in sae.named_parameters()}
    for key, p in sae.named_parameters():
        p.grad = torch.empty_like(p).copy_(before[key])
    with kernels.use_backend(backend):
        rows = losses.Subset.copied(sae, dead)
        loss = losses.auxk(sae, x, error, rows, k_aux, through)
        (3 * loss).backward()
        rows.add_gradients(sae)
    exact = copy.deepcopy(sae).double()
    exact.zero_grad()
    expected = naive_auxk(exact, x.double(), error.double(), dead, min(k_aux, 6), through)
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for key, p in exact.named_parameters():
        wanted = before[key].double() + (0 if p.grad is None else p.grad)
        torch.testing.assert_close(sae.get_parameter(key).grad.double(), wanted, rtol=1e-4, atol=1e-5)


def test_latents_that_take_no_part_change_nothing() -> None:
    """A list that also holds living latents gives the loss and the gradients of the dead ones alone."""
    for (name, through), k_aux in itertools.product((("topk", False), ("topk", True), ("abs_topk", True)), (2, 4, 64)):
        sae, x, error = noisy(name)
        listed, dead = torch.tensor([0, 1, 4, 5, 11, 12, 17, 29]), torch.tensor([1, 4, 5, 11, 17])
        active = torch.isin(listed, dead)
        found = []
        for rows in (losses.Subset.copied(sae, listed, active), losses.Subset.copied(sae, dead)):
            sae.zero_grad()
            loss = losses.auxk(sae, x, error, rows, k_aux, through)
            loss.backward()
            rows.add_gradients(sae)
            found.append([loss.detach(), *(p.grad for p in (sae.W_enc, sae.b_enc, sae.W_dec))])
        for masked, alone in zip(*found):
            torch.testing.assert_close(masked, alone, rtol=1e-5, atol=1e-6)
    nobody = losses.Subset.copied(sae, listed, torch.zeros(8, dtype=torch.bool))
    assert losses.auxk(sae, x, error, nobody, 4) == 0

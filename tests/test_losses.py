"""Losses against their formulas, written out densely in float64."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from saelab import losses
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


def naive_auxk(sae: LinearSAE, x: Tensor, error: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """As in the reference trainer: the dead pre-activations, the rest masked out, dense."""
    b_in = sae.b_dec.detach() if sae.b_in is not None else 0.0
    u = (x - b_in) @ sae.W_enc + sae.b_enc
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[dead] = True
    key = (u.abs() if sae.signed else u).masked_fill(~mask, -torch.inf)
    chosen = torch.zeros_like(u).scatter(1, key.topk(k_aux).indices, 1.0)
    acts = u * chosen if sae.signed else (u * chosen).relu()
    target = error.detach()
    return ((acts @ sae.W_dec - target).square().mean()) / (target - target.mean(0)).square().mean()


@pytest.mark.parametrize(
    ("name", "config"), [("topk", {}), ("abs_topk", {}), ("abs_topk", {"apply_b_dec_to_input": False})]
)
@pytest.mark.parametrize("k_aux", [1, 4])
def test_auxk_and_its_gradient(name: str, config: dict, k_aux: int) -> None:
    sae, x, error = sae_and_error(name, **config)
    dead = torch.tensor([1, 4, 5, 11, 17, 29])
    loss = losses.auxk(sae, x, error, dead, k_aux)
    loss.backward()
    found = {key: None if p.grad is None else p.grad.clone() for key, p in sae.named_parameters()}
    sae.zero_grad()
    expected = naive_auxk(sae, x, error, dead, k_aux)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert found.pop("b_dec") is None, "the residual has no bias: the loss may not move it"
    for key, grad in found.items():
        torch.testing.assert_close(grad, sae.get_parameter(key).grad)
        untouched = torch.ones(D_SAE, dtype=torch.bool)
        untouched[dead] = False
        rows = grad.T if key == "W_enc" else grad
        assert (rows[untouched] == 0).all(), f"{key} of live latents is trained by AuxK"


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

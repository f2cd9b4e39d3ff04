"""Adam for column-major parameters: PyTorch's numbers, in place, and without copies."""

from __future__ import annotations

import pytest
import torch

from saelab import kernels
from saelab.kernels.adam import rounded, seeds
from saelab.kernels.dispatch import obstacle
from tests.devices import EVERY_DEVICE


@EVERY_DEVICE
@pytest.mark.parametrize("column_major", [True, False])
def test_the_updates_are_those_of_pytorch_to_the_bit(column_major: bool, device: str) -> None:
    start = torch.randn(7, 5, device=device)
    gradients = torch.randn(3, 7, 5, device=device)
    results = []
    for make in (kernels.Adam, torch.optim.Adam):
        weight = start.clone()
        weight = (weight.T.contiguous().T if column_major else weight).requires_grad_()
        bias = torch.ones(4, device=device, requires_grad=True)
        optimizer = make([weight, bias], lr=0.1, fused=True)
        for gradient in gradients:
            weight.grad = torch.empty_like(weight).copy_(gradient)
            bias.grad = gradient[0, :4].clone()
            optimizer.step()
        moment = optimizer.state[weight]["exp_avg"]
        assert moment.shape == weight.shape and moment.stride() == weight.stride()
        results.append((weight.detach(), bias.detach(), moment))
    for mine, theirs in zip(*results):
        assert torch.equal(mine, theirs)


def test_the_fused_update_is_given_contiguous_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch._fused_adam_

    def watch(params, grads, *rest, **options):
        seen.extend([*params, *grads, *rest[0], *rest[1]])
        return original(params, grads, *rest, **options)

    monkeypatch.setattr(torch, "_fused_adam_", watch)
    weight = torch.randn(5, 7).T.requires_grad_()
    weight.grad = torch.randn(5, 7).T
    kernels.Adam([weight], fused=True).step()
    assert len(seen) == 4 and all(tensor.is_contiguous() for tensor in seen)


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_an_update_with_a_factor_and_normalised_rows_is_adam(backend: str, moments: torch.dtype) -> None:
    """Against PyTorch's Adam in float64 on weights that were normalised and gradients that were scaled before."""
    if obstacle(backend, "cpu") is not None:
        pytest.skip(str(obstacle(backend, "cpu")))
    start, factor = torch.randn(300, 70), torch.tensor(0.25)
    mine, exact = start.clone().requires_grad_(), start.double().requires_grad_()
    turned = start.T.contiguous().T.requires_grad_()  # in the other order in memory
    bias = torch.ones(9, requires_grad=True)
    ours = kernels.Adam([mine, turned, bias], lr=0.01, eps=6.25e-10, fused=True, moments=moments)
    theirs = torch.optim.Adam([exact], lr=0.01, eps=6.25e-10)
    with kernels.use_backend(backend):
        for _ in range(5):
            gradient = torch.randn(300, 70)
            mine.grad, bias.grad, exact.grad = gradient, torch.ones(9), 0.25 * gradient.double()
            turned.grad = torch.empty_like(turned).copy_(gradient)
            norms = 1 / exact.detach().norm(dim=1)
            with torch.no_grad():
                exact *= norms[:, None]
                turned.copy_(exact)
            ours.update(factor, torch.zeros(()), {mine: norms.float()})
            theirs.step()
    close = {"rtol": 1e-4, "atol": 1e-5} if moments == torch.float32 else {"rtol": 0, "atol": 2e-3}  # of steps of 1e-2
    torch.testing.assert_close(mine.double(), exact, **close)
    torch.testing.assert_close(turned.double(), exact, **close)
    assert ours.state[mine]["exp_avg"].dtype == moments and (bias < 1).all()
    before = [mine.detach().clone(), ours.state[mine]["exp_avg"].clone()]
    with kernels.use_backend(backend):
        mine.grad, turned.grad = torch.full_like(mine, torch.nan), None
        ours.update(torch.tensor(torch.nan), torch.ones(()), {})
    assert torch.equal(mine, before[0]) and torch.equal(ours.state[mine]["exp_avg"], before[1])


def test_bfloat16_moments_are_the_same_on_every_backend_and_right_on_average() -> None:
    x = torch.rand(40_000) * 3
    drawn = torch.stack([rounded(x, 0, seeds(step)[0]).float() for step in range(64)])
    neighbours = x.view(torch.int32) & -65536
    assert ((drawn.view(torch.int32) - neighbours) % 65536 == 0).all() and (drawn.std(0) > 0).float().mean() > 0.9
    # Half a step in the last place, 2^-8, over the square root of 64 x 40,000 draws is 2.4e-6.
    assert ((drawn - x).double().mean() / x.double().mean()).abs() < 1.5e-5
    assert rounded(torch.tensor([torch.inf, -torch.inf]), 0, 1).tolist() == [torch.inf, -torch.inf]
    if obstacle("triton", "cpu") is not None:
        pytest.skip("needs Triton's interpreter")
    found = []
    for name in ("numba", "triton"):
        weight = x.clone().requires_grad_()
        optimizer = kernels.Adam([weight], lr=0.1, moments=torch.bfloat16)
        weight.grad = torch.randn(40_000, generator=torch.Generator().manual_seed(1))
        with kernels.use_backend(name):
            optimizer.update()
        found.append(optimizer.state[weight])
    for key in ("exp_avg", "exp_avg_sq"):
        differ = found[0][key] != found[1][key]
        assert differ.float().mean() < 0.01  # the last bit of a float32 product may differ, and tip the rounding


def test_a_second_moment_in_bfloat16_can_fall() -> None:
    """To the nearest, a step of a thousandth would be rounded away every time."""
    weight = torch.zeros(1000, requires_grad=True)
    optimizer = kernels.Adam([weight], lr=0.0, moments=torch.bfloat16)
    weight.grad = torch.ones(1000)
    optimizer.update()
    weight.grad = torch.zeros(1000)
    start = optimizer.state[weight]["exp_avg_sq"].float().mean()
    for _ in range(300):
        optimizer.update()
    ratio = optimizer.state[weight]["exp_avg_sq"].float().mean() / start
    assert float(ratio) == pytest.approx(0.999**300, rel=0.01)

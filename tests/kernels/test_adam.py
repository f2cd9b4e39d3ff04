"""Adam for column-major parameters: PyTorch's numbers, in place, and without copies."""

from __future__ import annotations

import pytest
import torch

from saelab import kernels
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

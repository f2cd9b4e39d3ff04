"""The hand-written backward passes, checked against finite differences, and the conventions they promise."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from saelab import kernels
from saelab.kernels.cases import random_case


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("signed", [False, True])
def test_encoder_and_loss_pass_gradcheck(signed: bool) -> None:
    """Small steps do not change the selection, so the composition is differentiable around this point."""

    def loss(x, W_enc, b_enc, b_dec, W_dec):
        selected = kernels.select_topk(x, W_enc, b_enc, b_dec, k=2, signed=signed)
        values = kernels.pre_acts_at(x, W_enc, b_enc, b_dec, selected)
        return kernels.sse(x, values, selected.indices, selected.row_ptr, W_dec, b_dec)[0]

    assert gradcheck(loss, (double(3, 4), double(4, 6), double(6), double(4), double(6, 4)))


def test_decode_passes_gradcheck_with_an_empty_row() -> None:
    code = torch.tensor([0, 2, 1, 2, 0]), torch.tensor([0, 2, 2, 5])
    assert gradcheck(
        lambda values, W_dec, b_dec: kernels.decode(values, *code, W_dec, b_dec),
        (double(5), double(3, 4), double(4)),
    )


@pytest.mark.parametrize("options", [{}, {"residual_stop": 0.9}, {"stop_on_repeat": True}], ids=str)
def test_pursuit_passes_gradcheck_through_the_residual_chain(options: dict) -> None:
    def weighed(x, W_dec, b_dec):
        code = kernels.pursuit(x, W_dec, b_dec, n_steps=6, **options)
        return code.values * torch.linspace(1, 2, code.values.numel(), dtype=torch.float64)

    # Few atoms and many steps: some are taken more than once, and the norms are free.
    W_dec = (torch.nn.functional.normalize(torch.randn(4, 3), dim=1) * 0.9).double().requires_grad_()
    assert gradcheck(weighed, (double(3, 3), W_dec, double(3)))


def test_a_clipped_winner_passes_no_gradient() -> None:
    x, W_enc = torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1.0, -1.0, -3.0], [0.0, 0.0, 0.0]]).double()
    W_enc.requires_grad_()
    selected = kernels.select_topk(x, W_enc, None, None, k=2)
    values = kernels.pre_acts_at(x, W_enc, None, None, selected)
    assert dict(zip(selected.indices.tolist(), values.tolist())) == {0: 1.0, 1: 0.0}
    values.sum().backward()
    assert W_enc.grad.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_a_negative_winner_passes_gradient_when_signed() -> None:
    x, W_enc = torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1.0, -1.0, -3.0], [0.0, 0.0, 0.0]]).double()
    W_enc.requires_grad_()
    selected = kernels.select_topk(x, W_enc, None, None, k=1, signed=True)
    values = kernels.pre_acts_at(x, W_enc, None, None, selected)
    assert (selected.indices.tolist(), values.tolist()) == ([2], [-3.0])
    values.sum().backward()
    assert W_enc.grad.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


def test_the_encoder_gradient_keeps_the_column_major_layout() -> None:
    """The optimizer's moments take the gradient's layout, and autograd copies where it differs from the weight's."""
    case = random_case(6, 8, 32, 4)
    W_enc = case.W_enc.clone().requires_grad_()
    assert W_enc.stride() == (1, 8)
    selected = kernels.select_topk(case.x, W_enc, case.b_enc, case.b_dec, 4)
    kernels.pre_acts_at(case.x, W_enc, case.b_enc, case.b_dec, selected).sum().backward()
    assert W_enc.grad.stride() == W_enc.stride()


def test_two_losses_on_one_code_both_reach_the_encoder() -> None:
    """A second term on the same values (an auxiliary or multi-k loss) trains the encoder as well."""
    case = random_case(6, 8, 32, 4)
    W_enc = case.W_enc.clone().requires_grad_()
    selected = kernels.select_topk(case.x, W_enc, None, None, 4)
    values = kernels.pre_acts_at(case.x, W_enc, None, None, selected)
    both = kernels.sse(case.x, values, selected.indices, selected.row_ptr, case.W_dec, None)[0].sum() + values.sum()
    both.backward()
    once = W_enc.grad.clone()
    W_enc.grad = None
    values = kernels.pre_acts_at(case.x, W_enc, None, None, selected)
    kernels.sse(case.x, values, selected.indices, selected.row_ptr, case.W_dec, None)[0].sum().backward()
    assert (once - W_enc.grad).abs().max() > 0.1

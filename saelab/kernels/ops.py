"""The public ops: selection without gradient, then differentiable values and decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saelab.kernels import reference


class SelectedPreActs(NamedTuple):
    """A ragged selection: ``values [nnz]``, ``indices [nnz]``, ``row_ptr [n + 1]``; no gradient attached."""

    values: Tensor
    indices: Tensor
    row_ptr: Tensor


@torch.no_grad()
def select_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, signed: bool = False
) -> SelectedPreActs:
    """Per token the ``k`` largest pre-activations (magnitudes when ``signed``, sign kept)."""
    values, indices = reference.topk(reference.pre_acts(x, W_enc, b_enc, b_dec), k, signed)
    row_ptr = torch.arange(x.shape[0] + 1, device=x.device) * k
    return SelectedPreActs(values.reshape(-1), indices.reshape(-1), row_ptr)


@torch.no_grad()
def select_batch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool = False
) -> SelectedPreActs:
    """The ``budget`` largest pre-activations of the whole batch; ties go to the lowest (token, latent)."""
    acts = reference.pre_acts(x, W_enc, b_enc, b_dec)
    _, flat = reference.topk(acts.reshape(1, -1), budget, signed)
    mask = torch.zeros(acts.numel(), dtype=torch.bool, device=x.device)
    mask[flat[0]] = True
    return SelectedPreActs(*reference.ragged_from_mask(acts if signed else acts.relu(), mask.view_as(acts)))


@torch.no_grad()
def select_latent(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    budgets: Tensor,
    signed: bool = False,
) -> SelectedPreActs:
    """Per latent ``j`` its ``budgets[j]`` largest pre-activations over the batch (``budgets [d_sae]``, int64)."""
    acts = reference.pre_acts(x, W_enc, b_enc, b_dec)
    key = acts.abs() if signed else acts
    rank = key.sort(dim=0, descending=True, stable=True).indices.argsort(dim=0)
    return SelectedPreActs(*reference.ragged_from_mask(acts if signed else acts.relu(), rank < budgets))


@torch.no_grad()
def select_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor | float,
    signed: bool = False,
) -> SelectedPreActs:
    """Pre-activations strictly above ``threshold`` (a number or ``[d_sae]``); magnitudes when ``signed``."""
    acts = reference.pre_acts(x, W_enc, b_enc, b_dec)
    key = acts.abs() if signed else acts
    return SelectedPreActs(*reference.ragged_from_mask(acts, key > threshold))


class _PreActsAt(torch.autograd.Function):
    """Attach gradients to selected pre-activations: sparse on both sides."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, values, indices, row_ptr):  # pyright: ignore
        ctx.save_for_backward(x, W_enc, b_dec, values, indices, row_ptr)
        return values.clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        x, W_enc, b_dec, values, indices, row_ptr = ctx.saved_tensors
        # A winner that was clipped to zero did not fire, so it passes no gradient.
        grad = grad * (values != 0)
        rows = reference.row_ids(row_ptr, values.numel())
        d_sae = W_enc.shape[1]
        d_b_enc = grad.new_zeros(d_sae).index_add_(0, indices, grad)
        d_x = d_W = d_b_dec = None
        if ctx.needs_input_grad[1]:
            centred = x if b_dec is None else x - b_dec
            d_W = x.new_zeros(d_sae, x.shape[1]).index_add_(0, indices, grad[:, None] * centred[rows]).T
        if ctx.needs_input_grad[3]:
            d_b_dec = -(W_enc @ d_b_enc)
        if ctx.needs_input_grad[0]:
            d_x = reference.decode(grad, indices, row_ptr, W_enc.T)
        return d_x, d_W, d_b_enc if ctx.needs_input_grad[2] else None, d_b_dec, None, None, None


def pre_acts_at(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    selected: SelectedPreActs,
) -> Tensor:
    """The selected values, differentiable in ``x``, ``W_enc``, ``b_enc`` and ``b_dec``. Returns ``[nnz]``.

    Nothing of size ``[n, d_sae]`` is built in the backward pass, and the gradient of ``b_dec`` through the
    encoder is one matrix-vector product.
    """
    return _PreActsAt.apply(x, W_enc, b_enc, b_dec, *selected)  # pyright: ignore


def decode(values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """``dense(code) @ W_dec + b_dec``, differentiable in ``values``, ``W_dec`` and ``b_dec``. ``[n, d_in]``."""
    recon = reference.decode(values, indices, row_ptr, W_dec)
    return recon if b_dec is None else recon + b_dec

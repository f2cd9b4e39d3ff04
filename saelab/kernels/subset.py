"""How well a few latents explain a residual: the sum behind the AuxK loss, with its gradients.

The latents are few and a token takes many of them, so the code is not sparse: products of dense matrices are the fast
form, chunk by chunk of tokens, and the gradients are taken on the same visit. On a CPU the sparse kernels are faster
where a token takes less than ``DENSE_FROM`` of the latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab.kernels import ops
from saelab.kernels.dispatch import backend
from saelab.kernels.precision import rounds, sums_in_float32
from saelab.kernels.products import CHUNK_BYTES, DEVICE_CHUNK_BYTES, chunk_rows

DENSE_FROM = 0.5  # share of the latents that a token takes; a sparse entry costs about two dense ones (AVX-512)


def explain(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    k: int,
    signed: bool = False,
    active: Tensor | None = None,
    through: bool = False,
) -> Tensor:
    """``sum ||residual - z W_dec||^2`` with ``z`` the ``k`` largest of ``x @ W_enc.T + b_enc`` per token, rectified.

    With ``signed`` the ``k`` largest magnitudes with their sign. ``W_enc [m, d_in]`` has a row for each latent, like
    ``W_dec [m, d_in]``. ``active [m]`` marks the latents that take part; None means all. Differentiable in ``W_enc``,
    ``b_enc`` and ``W_dec`` only; with ``through`` the gradient of ``z`` passes the rectifier also where it cuts off.
    Returns a number.
    """
    x, residual = x.detach(), residual.detach()
    if active is None and k < DENSE_FROM * W_enc.shape[0] and backend(x) == "numba":
        encoder = W_enc.T, b_enc, None
        selected = ops.select_topk(x, *encoder, k, signed, clip=not through)
        values = ops.pre_acts_at(x, *encoder, selected)
        if through and not signed:
            values = rectified(values)
        return ops.sse(residual, values, selected.indices, selected.row_ptr, W_dec, None)[0].sum()
    return Explained.apply(W_enc, b_enc, W_dec, x, residual, k, signed, active, through)  # pyright: ignore


def rectified(values: Tensor) -> Tensor:
    """``relu(values [nnz])`` with the gradient of ``values``: straight through (Bengio et al., arXiv 1308.3432)."""
    return values + (values.relu() - values).detach()


class Explained(torch.autograd.Function):
    """The dense form of :func:`explain`: five products, and no matrix larger than one chunk of tokens."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, W_dec, x, residual, k, signed, active, through):  # pyright: ignore
        low = rounds(x) and sums_in_float32(str(x.device))
        with torch.autocast(x.device.type, enabled=False):
            squares, *grads = _visit(W_enc, b_enc, W_dec, x, residual, k, signed, active, through, low)
        ctx.save_for_backward(*grads)
        return squares

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        return *(grad * saved for saved in ctx.saved_tensors), *[None] * 6


def _visit(W_enc, b_enc, W_dec, x, residual, k, signed, active, through, low) -> tuple[Tensor, ...]:
    m = W_enc.shape[0]
    rows = chunk_rows(x.shape[0], m, x.element_size(), DEVICE_CHUNK_BYTES if x.is_cuda else CHUNK_BYTES)
    squares = x.new_zeros(())
    d_enc, d_b, d_dec = torch.zeros_like(W_enc), torch.zeros_like(b_enc), torch.zeros_like(W_dec)
    for start in range(0, x.shape[0], max(rows, 1)):
        part = x[start : start + rows]
        u = _product(part, W_enc.T, low).add_(b_enc)
        kept = _kept(u.abs() if signed else u, k, signed or through, active)
        z = torch.where(kept, u if signed else u.relu(), 0.0)
        error = _product(z, W_dec, low).sub_(residual[start : start + rows])
        squares += error.square().sum()
        error *= 2
        d_z = torch.where(kept, _product(error, W_dec.T, low), 0.0)
        d_dec += _product(z.T, error, low)
        d_enc += _product(d_z.T, part, low)
        d_b += d_z.sum(0)
    return squares, d_enc, d_b, d_dec


def _kept(key: Tensor, k: int, negative: bool, active: Tensor | None) -> Tensor:
    """Which entries of ``key [n, m]`` get a gradient: the ``k`` largest of a row, those below zero with ``negative``.

    NaN is kept, so that it reaches the loss.
    """
    if active is not None:
        key = key.masked_fill(~active, -torch.inf)
    kept = key > -torch.inf if negative else key > 0
    kept |= key.isnan()
    if k < key.shape[1]:
        best = key.topk(k, dim=1, sorted=False).indices
        kept &= torch.zeros_like(kept).scatter_(1, best, True)
    return kept


def _product(a: Tensor, b: Tensor, low: bool) -> Tensor:
    """``a @ b``; with ``low`` of operands rounded to bfloat16, summed and returned in float32."""
    if low:
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    return torch.mm(a, b)

"""The differentiable halves of the ops: hand-written backward passes that stay sparse on both sides.

With the code's entries ``e = (row, latent, value)``: ``dW_dec[latent] += value * dL/drecon[row]``, ``dL/dvalue =
dL/drecon[row] . W_dec[latent]``, and for encoder values ``dW_enc[:, latent] += dL/dvalue * (x[row] - b_dec)``. A value
of zero did not fire and passes nothing. ``b_dec`` reaches the encoder through one matrix-vector product. The
implementation is fixed in the forward pass, since the backward pass may run on another thread.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab.kernels.dispatch import implementation
from saelab.kernels.reference import pursuit as pursuit_reference


class PreActsAt(torch.autograd.Function):
    """Attach gradients to selected pre-activations."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, values, indices, row_ptr):  # pyright: ignore
        ctx.save_for_backward(x, W_enc, b_dec, values, indices, row_ptr)
        ctx.implementation = implementation(x)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        x, W_enc, b_dec, values, indices, row_ptr = ctx.saved_tensors
        ops, (for_x, for_W, for_b_enc, for_b_dec) = ctx.implementation, ctx.needs_input_grad[:4]
        # A winner that ReLU clipped to zero did not fire: without the mask it would be trained all the same.
        grad = grad * (values != 0)
        d_b_enc = ops.latent_sum(grad, indices, W_enc.shape[1]) if for_b_enc or for_b_dec else None
        d_W = ops.latent_grad(grad, indices, row_ptr, x, W_enc.shape[1], b_dec).T if for_W else None
        return (
            ops.decode(grad, indices, row_ptr, W_enc.T, None) if for_x else None,
            d_W,
            d_b_enc if for_b_enc else None,
            -(W_enc @ d_b_enc) if for_b_dec else None,
            None,
            None,
            None,
        )


class Decode(torch.autograd.Function):
    """``dense(code) @ W_dec + b_dec``."""

    @staticmethod
    def forward(ctx, values, indices, row_ptr, W_dec, b_dec):  # pyright: ignore
        ctx.save_for_backward(values, indices, row_ptr, W_dec)
        ctx.implementation = implementation(W_dec)
        return ctx.implementation.decode(values, indices, row_ptr, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        values, indices, row_ptr, W_dec = ctx.saved_tensors
        ops, (for_values, _, _, for_W, for_b) = ctx.implementation, ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            ops.value_grad(grad, indices, row_ptr, W_dec) if for_values else None,
            None,
            None,
            ops.latent_grad(values, indices, row_ptr, grad, W_dec.shape[0]) if for_W else None,
            grad.sum(0) if for_b else None,
        )


class SquaredError(torch.autograd.Function):
    """``sum((recon - x)^2)`` per token; the residual and the value gradients come out of the forward visit."""

    @staticmethod
    def forward(ctx, x, values, indices, row_ptr, W_dec, b_dec):  # pyright: ignore
        ctx.implementation = implementation(x)
        sse, recon, error, along = ctx.implementation.decode_error(x, values, indices, row_ptr, W_dec, b_dec)
        ctx.save_for_backward(values, indices, row_ptr, error, along)
        ctx.d_sae = W_dec.shape[0]
        ctx.mark_non_differentiable(recon)
        return sse, recon

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # pyright: ignore
        values, indices, row_ptr, error, along = ctx.saved_tensors
        ops, (for_x, for_values, _, _, for_W, for_b) = ctx.implementation, ctx.needs_input_grad
        weight = 2.0 * grad  # [n]
        per_entry = weight.repeat_interleave(row_ptr.diff(), output_size=values.numel())
        return (
            -weight[:, None] * error if for_x else None,
            along * per_entry if for_values else None,
            None,
            None,
            ops.latent_grad(values * per_entry, indices, row_ptr, error, ctx.d_sae) if for_W else None,
            weight @ error if for_b else None,
        )


class Pursuit(torch.autograd.Function):
    """Matching pursuit; see :mod:`saelab.kernels.reference.pursuit` for the equations."""

    @staticmethod
    def forward(ctx, x, W_dec, b_dec, n_steps, residual_stop, stop_on_repeat):  # pyright: ignore
        ctx.implementation = implementation(x)
        trace = ctx.implementation.pursue(x, W_dec, b_dec, n_steps, residual_stop, stop_on_repeat)
        values, indices, row_ptr, entry = pursuit_reference.merge(trace)
        ctx.save_for_backward(x, W_dec, b_dec, *trace, entry)
        ctx.mark_non_differentiable(indices, row_ptr)
        return values, indices, row_ptr

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore
        x, W_dec, b_dec, steps, coefficients, entry = ctx.saved_tensors
        # An atom taken twice has one value, the sum of its coefficients: each of them gets the whole gradient.
        padded = torch.cat([grad, grad.new_zeros(1)])
        trace = pursuit_reference.Trace(steps, coefficients)
        d_x, d_W = ctx.implementation.pursue_backward(padded[entry], x, W_dec, b_dec, trace)
        d_b = -d_x.sum(0) if b_dec is not None and ctx.needs_input_grad[2] else None
        return d_x if ctx.needs_input_grad[0] else None, d_W, d_b, None, None, None


def detached(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]

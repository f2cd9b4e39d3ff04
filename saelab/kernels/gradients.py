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
from saelab.kernels.reference.backend import entry_grads


class PreActsAt(torch.autograd.Function):
    """Attach gradients to selected pre-activations."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, values, indices, row_ptr, by):  # pyright: ignore
        ctx.save_for_backward(x, W_enc, b_dec, values, indices, row_ptr)
        ctx.implementation, ctx.by = implementation(x), by
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        x, W_enc, b_dec, values, indices, row_ptr = ctx.saved_tensors
        ops, (for_x, for_W, for_b_enc, for_b_dec) = ctx.implementation, ctx.needs_input_grad[:4]
        d_x = d_W = d_b_enc = None
        if for_x:
            d_x = ops.decode(entry_grads(values, 1.0, None, grad), indices, row_ptr, W_enc.T, None)
        if for_W or for_b_enc or for_b_dec:
            sums = ctx.by.sums
            by, measure = ctx.by.sorted(ops), sums is not None
            found = ops.latent_grads(by, values, extra=grad, x=x, offset=b_dec, measure=measure)
            d_W, d_b_enc = found.enc.T, found.bias
            if sums is not None:
                sums.add(found, W_enc=found.enc)
        d_b_dec = -(W_enc @ d_b_enc) if for_b_dec else None
        return d_x, d_W, d_b_enc if for_b_enc else None, d_b_dec, None, None, None, None


class Decode(torch.autograd.Function):
    """``dense(code) @ W_dec + b_dec``."""

    @staticmethod
    def forward(ctx, values, indices, row_ptr, W_dec, b_dec, by):  # pyright: ignore
        ctx.save_for_backward(values, indices, row_ptr, W_dec)
        ctx.implementation, ctx.by = implementation(W_dec), by
        return ctx.implementation.decode(values, indices, row_ptr, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        values, indices, row_ptr, W_dec = ctx.saved_tensors
        ops, (for_values, _, _, for_W, for_b, _) = ctx.implementation, ctx.needs_input_grad
        grad, d_W, sums = grad.contiguous(), None, ctx.by.sums
        if for_W:
            constrained = None if sums is None else W_dec
            found = ops.latent_grads(ctx.by.sorted(ops), values, error=grad, W_dec=constrained)
            d_W = found.dec
            if sums is not None:
                sums.add(found, W_dec=d_W)
        return (
            ops.value_grad(grad, indices, row_ptr, W_dec) if for_values else None,
            None,
            None,
            d_W,
            grad.sum(0) if for_b else None,
            None,
        )


class SquaredError(torch.autograd.Function):
    """``sum((recon - x)^2)`` per token; the residual and the value gradients come out of the forward visit."""

    @staticmethod
    def forward(ctx, x, values, indices, row_ptr, W_dec, b_dec, by):  # pyright: ignore
        ctx.implementation, ctx.by = implementation(x), by
        sse, recon, error, along = ctx.implementation.decode_error(x, values, indices, row_ptr, W_dec, b_dec)
        ctx.sums = by.sums if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(values, row_ptr, error, along, None if ctx.sums is None else W_dec)
        if ctx.sums is not None:
            ctx.sums.errors = sse
        ctx.mark_non_differentiable(recon)
        return sse, recon

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # pyright: ignore
        values, row_ptr, error, along, W_dec = ctx.saved_tensors
        ops, (for_x, for_values, _, _, for_W, for_b, _) = ctx.implementation, ctx.needs_input_grad
        weight, d_W = 2.0 * grad, None  # [n]
        if for_W:
            found = ops.latent_grads(ctx.by.sorted(ops), values, weight, error=error, W_dec=W_dec)
            d_W = found.dec
            if ctx.sums is not None:
                ctx.sums.add(found, W_dec=found.dec)
        return (
            -weight[:, None] * error if for_x else None,
            along * per_entry(weight, row_ptr, values) if for_values else None,
            None,
            None,
            d_W,
            weight @ error if for_b else None,
            None,
        )


class Reconstruct(torch.autograd.Function):
    """:class:`PreActsAt`, then :class:`SquaredError`: one gradient pass for both matrices and the encoder's bias."""

    @staticmethod
    def forward(ctx, x, target, W_enc, b_enc, b_in, W_dec, b_dec, values, indices, row_ptr, by, sums):  # pyright: ignore
        ctx.implementation, ctx.by, ctx.sums = implementation(x), by, sums
        ctx.of_input, wanted = target is None, x if target is None else target
        sse, recon, error, along = ctx.implementation.decode_error(wanted, values, indices, row_ptr, W_dec, b_dec)
        ctx.save_for_backward(x, W_enc, b_in, W_dec, values, indices, row_ptr, error, along)
        if sums is not None:
            sums.errors = sse
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(recon)
        return sse, recon, values.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _, extra):  # pyright: ignore
        x, W_enc, b_in, W_dec, values, indices, row_ptr, error, along = ctx.saved_tensors
        ops, (for_x, for_target, _, for_b_enc, for_b_in, _, for_b_dec, *_) = ctx.implementation, ctx.needs_input_grad
        weight = x.new_zeros(x.shape[0]) if grad is None else 2.0 * grad
        constrained = W_dec if ctx.sums is not None else None
        by = ctx.by.sorted(ops)
        if error.shape[1] == x.shape[1]:
            found = ops.latent_grads(by, values, weight, along, extra, error, x, b_in, constrained)
        else:  # one pass for each width
            found = ops.latent_grads(by, values, weight, along, extra, x=x, offset=b_in)
            found = found._replace(dec=ops.latent_grads(by, values, weight, error=error).dec)
        if ctx.sums is not None:
            ctx.sums.add(found, W_enc=found.enc, b_enc=found.bias, W_dec=found.dec)
        d_x = None
        if for_x:
            g = entry_grads(values, per_entry(weight, row_ptr, values), along, extra)
            d_x = ops.decode(g, indices, row_ptr, W_enc.T, None)
        to_target = -weight[:, None] * error if for_target or (for_x and ctx.of_input) else None
        if d_x is not None and ctx.of_input:
            d_x = d_x + to_target
        d_b_in = torch.addmv(b_in, W_enc, found.bias, beta=0, alpha=-1) if for_b_in else None
        d_b_dec = weight @ error if for_b_dec else None
        d_b_enc = found.bias if for_b_enc else None
        d_target = to_target if for_target else None
        return d_x, d_target, found.enc.T, d_b_enc, d_b_in, found.dec, d_b_dec, None, None, None, None, None


def per_entry(weight: Tensor, row_ptr: Tensor, values: Tensor) -> Tensor:
    """The number of each token at its entries. ``[nnz]``"""
    return weight.repeat_interleave(row_ptr.diff(), output_size=values.numel())


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

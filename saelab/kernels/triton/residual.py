"""Launching matching pursuit with Triton: over the Gram matrix where it pays and fits, else one product per step."""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.products import DEVICE_CHUNK_BYTES, products
from saelab.kernels.reference import pursuit as pursuit_reference
from saelab.kernels.reference.pursuit import Trace
from saelab.kernels.triton import pursuit as triton_pursuit
from saelab.kernels.triton.launch import launch
from saelab.kernels.triton.ragged import by_latent, latent_grads
from saelab.kernels.triton.shapes import chain_shape, pursuit_shape

WIDEST = 16384  # atoms whose products one program holds in registers
BACKWARD_BYTES = DEVICE_CHUNK_BYTES  # of per-step gradients that are held at a time


def pursue(
    x: Tensor, W_dec: Tensor, b_dec: Tensor | None, n_steps: int, residual_stop: float, stop_on_repeat: bool
) -> Trace:
    (n, d_in), d_sae = x.shape, W_dec.shape[0]
    if d_sae >= n_steps * n or d_sae > WIDEST:
        return pursuit_reference.pursue(x, W_dec, b_dec, n_steps, residual_stop, stop_on_repeat)
    trace = Trace(torch.zeros(n, n_steps, dtype=torch.int64, device=x.device), x.new_zeros(n, n_steps))
    W_dec, x = W_dec.detach().contiguous(), (x if b_dec is None else x - b_dec).detach().contiguous()
    gram = W_dec @ W_dec.T
    shape = pursuit_shape(d_sae, d_in, n_steps)
    for start, c in products(x, W_dec.T):
        rows = slice(start, start + c.shape[0])
        sizes = d_sae, d_in, n_steps, x.stride(0), W_dec.stride(0), residual_stop
        launch(
            triton_pursuit.pursue_kernel,
            (c.shape[0],),
            c,
            x[rows],
            W_dec,
            gram,
            trace.steps[rows],
            trace.coefficients[rows],
            *sizes,
            STOP_ON_REPEAT=stop_on_repeat,
            **shape,
        )
    return trace


def pursue_backward(
    grad: Tensor, x: Tensor, W_dec: Tensor, b_dec: Tensor | None, trace: Trace
) -> tuple[Tensor, Tensor]:
    (n, n_steps), (d_sae, d_in) = trace.steps.shape, W_dec.shape
    W_dec, x = W_dec.detach().contiguous(), (x if b_dec is None else x - b_dec).detach().contiguous()
    d_x, d_W = torch.empty(n, d_in, device=x.device), None
    grad, at_once = grad.contiguous(), max(1, BACKWARD_BYTES // (4 * n_steps * d_in))
    for start in range(0, n, at_once):
        rows = slice(start, min(start + at_once, n))
        steps, count = trace.steps[rows], rows.stop - start
        per_step = torch.empty(count * n_steps, d_in, device=x.device)
        sizes = d_in, n_steps, x.stride(0), W_dec.stride(0)
        launch(
            triton_pursuit.chain_kernel,
            (count,),
            grad[rows],
            x[rows],
            W_dec,
            steps,
            trace.coefficients[rows],
            per_step,
            d_x[rows],
            *sizes,
            **chain_shape(d_in),
        )
        each = torch.arange(count * n_steps + 1, device=x.device)
        by, ones = by_latent(steps.reshape(-1), each, d_sae), torch.ones_like(each[1:], dtype=torch.float32)
        part = latent_grads(by, ones, error=per_step).dec
        d_W = part if d_W is None else d_W.add_(part)  # each further chunk is a pass over the dictionary
    if d_W is None:  # no tokens
        d_W = torch.zeros(d_sae, d_in, device=x.device)
    return d_x.to(x.dtype), d_W.to(W_dec.dtype)

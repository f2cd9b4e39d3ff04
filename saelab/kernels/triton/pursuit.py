"""Triton matching pursuit over the Gram matrix: one program per token keeps all products in registers."""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pursue_kernel(
    products,
    x,
    W,
    gram,
    steps,
    coefficients,
    d_sae,
    d_in,
    n_steps,
    x_stride,
    W_stride,
    residual_stop,
    STOP_ON_REPEAT: tl.constexpr,
    STEPS: tl.constexpr,
    ATOMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All steps of one token. The coefficient comes from the residual; the products only choose the atom."""
    row = tl.program_id(0).to(tl.int64)
    atom, column, step = tl.arange(0, ATOMS), tl.arange(0, BLOCK), tl.arange(0, STEPS)
    exists, valid = atom < d_sae, column < d_in
    c = tl.load(products + row * d_sae + atom, mask=exists, other=float("-inf")).to(tl.float32)
    left = tl.load(x + row * x_stride + column, mask=valid, other=0.0).to(tl.float32)
    taken, amounts = tl.full([STEPS], -1, tl.int64), tl.zeros([STEPS], tl.float32)
    alive = 1
    for t in range(n_steps):
        alive = tl.where(tl.sqrt(tl.sum(left * left, axis=0)) > residual_stop, alive, 0)
        best = tl.max(c, axis=0)
        # Equal products go to the lowest atom; with a NaN nothing equals the maximum and j falls outside.
        j = tl.min(tl.where(c == best, atom, ATOMS), axis=0).to(tl.int64)
        alive = tl.where(j < d_sae, alive, 0)
        j = tl.where(j < d_sae, j, 0)
        direction = tl.load(W + j * W_stride + column, mask=valid, other=0.0).to(tl.float32)
        v = tl.sum(left * direction, axis=0)
        alive = tl.where(v > 0, alive, 0)
        v = tl.where(alive > 0, v, 0.0)
        again = tl.sum((taken == j).to(tl.int32), axis=0)
        here = (step == t) & (alive > 0)
        taken = tl.where(here, j, taken)
        amounts = tl.where(here, v, amounts)
        left -= v * direction
        c -= v * tl.load(gram + j * d_sae + atom, mask=exists, other=0.0).to(tl.float32)
        if STOP_ON_REPEAT:
            alive = tl.where(again > 0, 0, alive)
    tl.store(steps + row * n_steps + step, tl.where(taken < 0, 0, taken), mask=step < n_steps)
    tl.store(coefficients + row * n_steps + step, amounts, mask=step < n_steps)


@triton.jit
def chain_kernel(
    grad,
    x,
    W,
    steps,
    coefficients,
    per_step,
    d_x,
    d_in,
    n_steps,
    x_stride,
    W_stride,
    BLOCK: tl.constexpr,
):
    """Each step's share of its atom's gradient; the residuals are retraced backward from the last one."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < d_in
    left = tl.load(x + row * x_stride + column, mask=valid, other=0.0).to(tl.float32)
    for t in range(n_steps):
        j = tl.load(steps + row * n_steps + t)
        v = tl.load(coefficients + row * n_steps + t).to(tl.float32)
        left -= v * tl.load(W + j * W_stride + column, mask=valid, other=0.0).to(tl.float32)
    g = tl.zeros([BLOCK], tl.float32)
    for back in range(n_steps):
        t = n_steps - 1 - back
        j = tl.load(steps + row * n_steps + t)
        v = tl.load(coefficients + row * n_steps + t).to(tl.float32)
        direction = tl.load(W + j * W_stride + column, mask=valid, other=0.0).to(tl.float32)
        left += v * direction
        u = tl.load(grad + row * n_steps + t).to(tl.float32) - tl.sum(g * direction, axis=0)
        u = tl.where(v != 0, u, 0.0)
        tl.store(per_step + (row * n_steps + t) * d_in + column, u * left - v * g, mask=valid)
        g += u * direction
    tl.store(d_x + row * d_in + column, g, mask=valid)

"""Compiled matching pursuit: with the Gram matrix one step costs one row of it per token, instead of a product.

``c = D r`` is updated by ``c -= v * G[j]`` while the residual itself gives the coefficient ``v = d_j . r``, so rounding
in ``c`` can only decide between atoms that are nearly equal. Building ``G = D D^T`` pays while ``d_sae < n_steps * n``.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numba import prange
from torch import Tensor

from saelab.kernels.memory import on_release, recycled
from saelab.kernels.numba.code import NONE, by_column, dot, gather_driver, gather_rows
from saelab.kernels.numba.launch import array, compiled, launch
from saelab.kernels.products import products
from saelab.kernels.reference import pursuit as pursuit_reference
from saelab.kernels.reference.pursuit import Trace

GRAM_BYTES = 1 << 30  # d_sae up to 16384
LANES = 256
BACKWARD_ROWS = 128  # tokens whose per-step gradients are held at a time, about as many as the cache takes

_lock = threading.Lock()
_kept: list[Tensor] = []  # until memory.release(): the dictionary of the last call, copied, and its Gram matrix


@compiled(contract=True)
def subtract_and_maximise(c, row, v, maxima):
    """``c -= v * row``; returns the first position of the largest entry."""
    width, lanes = c.size, maxima.size
    maxima[:] = -np.inf
    for piece in range(width // lanes):
        # Slices have indices known to be positive, without which the loop would not be vectorised.
        part, other = c[piece * lanes : (piece + 1) * lanes], row[piece * lanes : (piece + 1) * lanes]
        for lane in range(lanes):
            value = part[lane] - v * other[lane]
            part[lane] = value
            maxima[lane] = value if value > maxima[lane] else maxima[lane]
    for i in range(width // lanes * lanes, width):
        c[i] -= v * row[i]
        lane = i % lanes
        maxima[lane] = c[i] if c[i] > maxima[lane] else maxima[lane]
    best = maxima[0]
    for lane in range(lanes):
        best = maxima[lane] if maxima[lane] > best else best
    position = width
    for lane in range(lanes):
        if maxima[lane] == best:
            for i in range(lane, width, lanes):
                if c[i] == best:
                    position = min(position, i)
                    break
    return position


@compiled(contract=True)
def pursue_rows(lo, hi, products, residual, W, gram, residual_stop, stop_on_repeat, steps, coefficients):
    """The whole pursuit of tokens ``lo .. hi``; ``products`` and ``residual`` are consumed."""
    n_steps, zero = steps.shape[1], np.zeros(W.shape[0], np.float32)
    maxima = np.empty(LANES, np.float32)
    for r in range(lo, hi):
        c, left = products[r], residual[r]
        row, v = zero, np.float32(0)
        for t in range(n_steps):
            # Negated, so that a NaN stops the token as well.
            if not np.sqrt(dot(left, left)) > residual_stop:
                break
            j = subtract_and_maximise(c, row, v, maxima)
            if j == c.size:
                break
            atom = W[j]
            v = dot(left, atom)
            if not v > 0:
                break
            again = False
            for s in range(t):
                again = again or steps[r, s] == j
            steps[r, t], coefficients[r, t] = j, v
            for i in range(left.size):
                left[i] -= v * atom[i]
            if again and stop_on_repeat:
                break
            row = gram[j]


@compiled(parallel=True)
def pursue_driver(parts, count, products, residual, W, gram, residual_stop, stop_on_repeat, steps, coefficients):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        pursue_rows(lo, hi, products, residual, W, gram, residual_stop, stop_on_repeat, steps, coefficients)


@compiled(contract=True, reassoc=True)
def chain_rows(lo, hi, grad, x, W, steps, coefficients, per_step, d_x):
    """Walk the residuals forward and their gradients back; ``per_step[r * T + t]`` is step t's share of its atom."""
    n_steps, width = steps.shape[1], W.shape[1]
    left = np.empty(width, np.float32)
    for r in range(lo, hi):
        left[:] = x[r]
        for t in range(n_steps):
            share, atom, v = per_step[r * n_steps + t], W[steps[r, t]], coefficients[r, t]
            for i in range(width):
                share[i] = left[i]
                left[i] -= v * atom[i]
        g = d_x[r]
        g[:] = 0
        for t in range(n_steps - 1, -1, -1):
            share, atom, v = per_step[r * n_steps + t], W[steps[r, t]], coefficients[r, t]
            u = grad[r, t] - dot(g, atom) if v != 0 else np.float32(0)
            for i in range(width):
                share[i] = u * share[i] - v * g[i]
                g[i] += u * atom[i]


@compiled(parallel=True)
def chain_driver(parts, count, grad, x, W, steps, coefficients, per_step, d_x):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        chain_rows(lo, hi, grad, x, W, steps, coefficients, per_step, d_x)


def pursue(
    x: Tensor, W_dec: Tensor, b_dec: Tensor | None, n_steps: int, residual_stop: float, stop_on_repeat: bool
) -> Trace:
    n, d_sae = x.shape[0], W_dec.shape[0]
    if d_sae >= n_steps * n or d_sae * d_sae * 4 > GRAM_BYTES:
        return pursuit_reference.pursue(x, W_dec, b_dec, n_steps, residual_stop, stop_on_repeat)
    trace = Trace(torch.zeros(n, n_steps, dtype=torch.int64), torch.zeros(n, n_steps))
    residual = x.detach().clone() if b_dec is None else (x - b_dec).detach()
    with _lock:
        matrices = array(W_dec), array(_gram(W_dec.detach()))
        for start, c in products(residual, W_dec.detach().T):
            rows = slice(start, start + c.shape[0])
            out = array(trace.steps[rows]), array(trace.coefficients[rows])
            stops = np.float32(residual_stop), stop_on_repeat
            launch(pursue_rows, pursue_driver, c.shape[0], array(c), array(residual[rows]), *matrices, *stops, *out)
    return trace


def _gram(W_dec: Tensor) -> Tensor:
    """``W_dec @ W_dec^T``, built anew unless the dictionary is, entry for entry, that of the last call."""
    if _kept and torch.equal(_kept[0], W_dec):
        return _kept[1]
    gram = (
        _kept[1] if _kept and _kept[1].shape[0] == W_dec.shape[0] else W_dec.new_empty(W_dec.shape[0], W_dec.shape[0])
    )
    _kept.clear()  # so that an interrupted build does not look finished
    torch.mm(W_dec, W_dec.T, out=gram)
    _kept.extend([W_dec.clone(), gram])
    return gram


@on_release
def _forget() -> None:
    with _lock:
        _kept.clear()


def pursue_backward(
    grad: Tensor, x: Tensor, W_dec: Tensor, b_dec: Tensor | None, trace: Trace
) -> tuple[Tensor, Tensor]:
    (n, n_steps), (d_sae, d_in) = trace.steps.shape, W_dec.shape
    x = x.detach() if b_dec is None else (x - b_dec).detach()
    d_x, d_W = recycled(n, d_in), recycled(d_sae, d_in).zero_()
    per_step = np.empty((min(n, BACKWARD_ROWS) * n_steps, d_in), np.float32)
    for start in range(0, n, BACKWARD_ROWS):
        rows = slice(start, min(start + BACKWARD_ROWS, n))
        steps, count = array(trace.steps[rows]), rows.stop - start
        chunk = array(grad[rows]), array(x[rows]), array(W_dec), steps, array(trace.coefficients[rows])
        launch(chain_rows, chain_driver, count, *chunk, per_step, array(d_x[rows]))
        order, ptr, _ = by_column(steps.reshape(-1), np.arange(count + 1) * n_steps, d_sae)
        ones = np.ones(order.size, np.float32)
        launch(gather_rows, gather_driver, d_sae, ones, order, ptr, per_step, NONE, False, array(d_W))
    return d_x, d_W

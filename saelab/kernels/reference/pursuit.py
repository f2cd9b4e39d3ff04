"""Matching pursuit in plain PyTorch: the loop, and the backward pass that keeps no graph.

From ``r_1 = x - b_dec``, step t takes ``j = argmax_i d_i . r_t`` (signed, ties to the lowest index), ``v_t = relu(d_j .
r_t)``, ``r_(t+1) = r_t - v_t d_j`` (Costa et al., 2025). The argmax passes no gradient; the coefficients and the whole
residual chain do. With ``g_(t+1) = dL/dr_(t+1)`` and ``u_t = [v_t > 0] (dL/dv_t - g_(t+1) . d_j)``:
``g_t = g_(t+1) + u_t d_j`` and ``dL/dd_j += u_t r_t - v_t g_(t+1)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saelab.kernels.memory import scratch
from saelab.kernels.products import chunk_rows
from saelab.kernels.ragged import pointers

BACKWARD_ROWS = 256  # tokens whose residuals of all steps are held at a time


class Trace(NamedTuple):
    """What the steps did: ``steps [n, T]`` the atom of each step, ``coefficients [n, T]`` (0 once a token stopped)."""

    steps: Tensor
    coefficients: Tensor


def pursue(
    x: Tensor, W_dec: Tensor, b_dec: Tensor | None, n_steps: int, residual_stop: float, stop_on_repeat: bool
) -> Trace:
    """Run ``n_steps`` steps on every token that has not stopped, with one product per step and chunk of tokens."""
    n = x.shape[0]
    trace = Trace(torch.zeros(n, n_steps, dtype=torch.int64, device=x.device), x.new_zeros(n, n_steps))
    rows = max(1, chunk_rows(n, W_dec.shape[0], x.element_size()))
    with scratch(rows * W_dec.shape[0], x) as flat:
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            chunk = Trace(trace.steps[part], trace.coefficients[part])
            _pursue_chunk(x[part], W_dec, b_dec, chunk, flat, residual_stop, stop_on_repeat)
    return trace


def _pursue_chunk(
    x: Tensor, W_dec: Tensor, b_dec: Tensor | None, out: Trace, flat: Tensor, residual_stop: float, stop_on_repeat: bool
) -> None:
    residual = x.clone() if b_dec is None else x - b_dec
    alive = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for t in range(out.steps.shape[1]):
        alive &= residual.norm(dim=1) > residual_stop
        rows = alive.nonzero().squeeze(1)
        if rows.numel() == 0:
            break
        scores = flat[: rows.numel() * W_dec.shape[0]].view(rows.numel(), W_dec.shape[0])
        # argmax is documented to return the first of equal maxima.
        best = torch.mm(residual[rows], W_dec.T, out=scores).argmax(1)
        value = (residual[rows] * W_dec[best]).sum(1).relu()
        if stop_on_repeat:
            repeats = ((out.steps[rows, :t] == best[:, None]) & (out.coefficients[rows, :t] != 0)).any(1)
            alive[rows[repeats]] = False
        # Without a positive product nothing changes, so every later step would do the same.
        alive[rows[value <= 0]] = False
        out.steps[rows, t], out.coefficients[rows, t] = best, value
        residual[rows] -= value[:, None] * W_dec[best]


def pursue_backward(
    grad: Tensor, x: Tensor, W_dec: Tensor, b_dec: Tensor | None, trace: Trace
) -> tuple[Tensor, Tensor]:
    """``(dL/dx [n, d_in], dL/dW_dec [d_sae, d_in])`` from ``grad = dL/d coefficients [n, T]``, tokens in chunks."""
    d_x, d_W = torch.zeros_like(x), torch.zeros_like(W_dec)
    for start in range(0, x.shape[0], BACKWARD_ROWS):
        part = slice(start, start + BACKWARD_ROWS)
        steps, coefficients = trace.steps[part], trace.coefficients[part]
        before = [x[part] if b_dec is None else x[part] - b_dec]
        for t in range(steps.shape[1] - 1):
            before.append(before[-1] - coefficients[:, t, None] * W_dec[steps[:, t]])
        g = torch.zeros_like(before[0])
        for t in reversed(range(steps.shape[1])):
            atom, value = W_dec[steps[:, t]], coefficients[:, t, None]
            u = (grad[part, t, None] - (g * atom).sum(1, keepdim=True)) * (value != 0)
            d_W.index_add_(0, steps[:, t], u * before[t] - value * g)
            g = g + u * atom
        d_x[part] = g
    return d_x, d_W


def merge(trace: Trace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One entry per (token, atom): ``values, indices, row_ptr`` and ``entry [n, T]``, each step's entry (-1: none).

    Entries of a row stand in the order in which the pursuit first took their atoms.
    """
    n, n_steps = trace.steps.shape
    position = torch.arange(n_steps, device=trace.steps.device).expand(n, n_steps)
    taken = trace.coefficients != 0
    # Steps that took the same atom become neighbours; a step that took nothing gets a name of its own.
    named, order = torch.where(taken, trace.steps, -1 - position).sort(dim=1, stable=True)
    heads = torch.cat([named.new_ones(n, 1, dtype=torch.bool), named[:, 1:] != named[:, :-1]], dim=1)
    first = order.gather(1, torch.where(heads, position, 0).cummax(1).values)
    opens = torch.zeros_like(taken).scatter(1, order, heads) & taken
    number = opens.reshape(-1).cumsum(0).view(n, n_steps) - 1
    entry = torch.where(taken, number.gather(1, torch.zeros_like(order).scatter(1, order, first)), -1)
    values = trace.coefficients.new_zeros(int(opens.sum())).index_add_(0, entry[taken], trace.coefficients[taken])
    counts = opens.sum(1)
    return values, trace.steps[opens], pointers(counts), entry

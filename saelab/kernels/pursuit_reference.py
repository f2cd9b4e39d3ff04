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


class Trace(NamedTuple):
    """What the steps did: ``steps [n, T]`` the atom of each step, ``coefficients [n, T]`` (0 once a token stopped)."""

    steps: Tensor
    coefficients: Tensor


def pursue(
    x: Tensor, W_dec: Tensor, b_dec: Tensor | None, n_steps: int, residual_stop: float, stop_on_repeat: bool
) -> Trace:
    """Run ``n_steps`` steps on every token that has not stopped."""
    residual = (x if b_dec is None else x - b_dec).clone()
    steps = torch.zeros(x.shape[0], n_steps, dtype=torch.int64, device=x.device)
    coefficients = x.new_zeros(x.shape[0], n_steps)
    alive = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for t in range(n_steps):
        alive &= residual.norm(dim=1) > residual_stop
        rows = alive.nonzero().squeeze(1)
        if rows.numel() == 0:
            break
        scores = residual[rows] @ W_dec.T
        best = first_argmax(scores)
        value = (residual[rows] * W_dec[best]).sum(1).relu()
        if stop_on_repeat:
            repeats = ((steps[rows, :t] == best[:, None]) & (coefficients[rows, :t] > 0)).any(1)
            alive[rows[repeats]] = False
        # Without a positive product nothing changes, so every later step would do the same.
        alive[rows[value <= 0]] = False
        steps[rows, t], coefficients[rows, t] = best, value
        residual[rows] -= value[:, None] * W_dec[best]
    return Trace(steps, coefficients)


def pursue_backward(
    grad: Tensor, x: Tensor, W_dec: Tensor, b_dec: Tensor | None, trace: Trace
) -> tuple[Tensor, Tensor]:
    """``(dL/dx [n, d_in], dL/dW_dec [d_sae, d_in])`` from ``grad = dL/d coefficients [n, T]``."""
    residual = (x if b_dec is None else x - b_dec).clone()
    n_steps = trace.steps.shape[1]
    before = []
    for t in range(n_steps):
        before.append(residual)
        residual = residual - trace.coefficients[:, t, None] * W_dec[trace.steps[:, t]]
    g, d_W = torch.zeros_like(x), torch.zeros_like(W_dec)
    for t in reversed(range(n_steps)):
        atom, value = W_dec[trace.steps[:, t]], trace.coefficients[:, t, None]
        u = (grad[:, t, None] - (g * atom).sum(1, keepdim=True)) * (value > 0)
        d_W.index_add_(0, trace.steps[:, t], u * before[t] - value * g)
        g = g + u * atom
    return g, d_W


def first_argmax(scores: Tensor) -> Tensor:
    """Per row the lowest index of the largest entry; NaN ranks as ``-inf``."""
    key = torch.where(scores.isnan(), float("-inf"), scores)
    best = key.amax(1, keepdim=True)
    positions = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(key == best, positions, scores.shape[1]).amin(1)


def merge(trace: Trace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One entry per (token, atom): ``values, indices, row_ptr`` and ``entry [n, T]``, each step's entry (-1: none).

    Entries of a row stand in the order in which the pursuit first took their atoms.
    """
    n, n_steps = trace.steps.shape
    taken = trace.coefficients > 0
    same = trace.steps[:, :, None] == trace.steps[:, None, :]  # [n, T, T]
    same &= taken[:, :, None] & taken[:, None, :]
    first = torch.where(same, torch.arange(n_steps, device=trace.steps.device), n_steps).amin(2)
    opens = taken & (first == torch.arange(n_steps, device=trace.steps.device))
    number = opens.reshape(-1).cumsum(0).view(n, n_steps) - 1
    entry = torch.where(taken, number.gather(1, first.clamp_max(n_steps - 1)), -1)
    nnz = int(opens.sum())
    values = trace.coefficients.new_zeros(nnz).index_add_(0, entry[taken], trace.coefficients[taken])
    counts = opens.sum(1)
    return values, trace.steps[opens], torch.cat([counts.new_zeros(1), counts.cumsum(0)]), entry

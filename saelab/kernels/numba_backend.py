"""The compiled CPU backend: the functions of :mod:`saelab.kernels.reference`, for float32 tensors on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saelab.kernels import numba_select as select
from saelab.kernels.chunks import products
from saelab.kernels.numba_code import by_column, decode, decode_error, latent_grad, latent_sum, value_grad  # noqa: F401
from saelab.kernels.numba_launch import array, launch
from saelab.kernels.numba_pursuit import pursue, pursue_backward  # noqa: F401
from saelab.kernels.reference import Ragged, pointers

NOTHING = np.zeros((1, 1), np.float32)
STAGED = 64  # entries kept ready per row where a row's number of winners is not known beforehand


def topk(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, signed: bool) -> Ragged:
    return _fixed(x, W_enc, b_enc, b_dec, k, select.MAGNITUDE if signed else select.PLAIN, (1.0, 0.0))


def gradient_topk(
    x: Tensor,
    grads: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    k: int,
    weights: tuple[float, float],
    signed: bool,
) -> Ragged:
    mode = select.MAGNITUDE_GRADIENT if signed else select.GRADIENT
    return _fixed(x, W_enc, b_enc, b_dec, k, mode, weights, products(grads, W_dec.T))


def _fixed(x, W_enc, b_enc, b_dec, k, mode, weights, effects=None) -> Ragged:
    n, d_sae = x.shape[0], W_enc.shape[1]
    values, indices = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
    bias, budgets = _bias(b_enc, d_sae), np.full(n, k)
    start, counts = np.arange(n + 1) * k, np.empty(n, np.int64)
    signed = mode in (select.MAGNITUDE, select.MAGNITUDE_GRADIENT)
    for first, z in products(centred(x, b_dec), W_enc):
        rows = slice(first, first + z.shape[0])
        extra = NOTHING if effects is None else array(next(effects)[1])
        _select(
            z,
            bias,
            extra,
            mode,
            weights,
            budgets[rows],
            0.0,
            not signed,
            start,
            array(values[rows]).reshape(-1),
            array(indices[rows]).reshape(-1),
            counts[rows],
        )
    return values.view(-1), indices.view(-1), torch.from_numpy(start)


def batch(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool) -> Ragged:
    n, d_sae = x.shape[0], W_enc.shape[1]
    mode, bias = select.MAGNITUDE if signed else select.PLAIN, _bias(b_enc, d_sae)
    keys, flat, values, bound = np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.float32), -np.inf
    for first, z in products(centred(x, b_dec), W_enc):
        if bound == -np.inf:
            bound = _first_bound(z, bias, mode, budget)
        found, columns, counts = _reaching(z, bias, NOTHING, mode, bound)
        rows = np.repeat(np.arange(first, first + z.shape[0]), counts)
        values = np.concatenate([values, found])
        keys = np.concatenate([keys, select_key(found, signed)])
        flat = np.concatenate([flat, rows * d_sae + columns])
        kept = select.merge_best(keys, flat, values, budget, np.empty_like(keys))
        keys, flat, values = keys[:kept], flat[:kept], values[:kept]
        # Once the budget is full, what stays below its smallest key cannot enter: later chunks yield less and less.
        bound = float(keys.min()) if kept == budget else -np.inf
    if not signed:
        values = np.maximum(values, 0)
    counts = np.bincount(flat // d_sae, minlength=n)
    return torch.from_numpy(values), torch.from_numpy(flat % d_sae), pointers(torch.from_numpy(counts))


def select_key(values: np.ndarray, signed: bool) -> np.ndarray:
    key = np.abs(values) if signed else values
    return np.where(np.isnan(key), np.float32(-np.inf), key)


def _first_bound(z: Tensor, bias: np.ndarray, mode: int, budget: int) -> float:
    """A value that at least ``budget`` keys of this chunk reach, or ``-inf``: the budget-th largest lane maximum."""
    lanes = min(select.LANES, z.shape[1])
    if budget > z.shape[0] * lanes:
        return -np.inf
    maxima = np.empty((z.shape[0], lanes), np.float32)
    launch(select.maxima_rows, select.maxima_driver, z.shape[0], array(z), bias, NOTHING, mode, maxima)
    return float(select.kth_largest(maxima.reshape(-1), maxima.size, budget))


def latent(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budgets: Tensor, signed: bool
) -> Ragged:
    n, d_sae = x.shape[0], W_enc.shape[1]
    start = pointers(budgets).numpy()
    values, tokens = np.empty(start[-1], np.float32), np.empty(start[-1], np.int64)
    mode, counts, per_latent = select.MAGNITUDE if signed else select.PLAIN, np.empty(d_sae, np.int64), budgets.numpy()
    for first, z in products(W_enc.T, centred(x, b_dec).T):  # z [latents, n]
        rows = slice(first, first + z.shape[0])
        if b_enc is not None:
            z += b_enc[rows, None]
        _select(
            z,
            np.zeros(n, np.float32),
            NOTHING,
            mode,
            (1.0, 0.0),
            per_latent[rows],
            0.0,
            not signed,
            start[first : first + z.shape[0] + 1] - start[first],
            values[start[first] :],
            tokens[start[first] :],
            counts[rows],
        )
    order, row_ptr, latents = by_column(tokens, start, n)
    return torch.from_numpy(values[order]), torch.from_numpy(latents), torch.from_numpy(row_ptr)


def threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, cut: Tensor, signed: bool
) -> Ragged:
    mode, bias = select.MAGNITUDE_ABOVE if signed else select.ABOVE, _bias(b_enc, W_enc.shape[1])
    parts = [
        # key - cut > 0 exactly where key > cut; the smallest positive number turns "at least" into "above".
        _reaching(z, bias, array(cut)[None], mode, float(np.float32(1e-45)))
        for _, z in products(centred(x, b_dec), W_enc)
    ]
    values, indices, counts = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    return values, indices, pointers(counts)


def _reaching(z: Tensor, bias: np.ndarray, extra: np.ndarray, mode: int, bound: float) -> tuple[np.ndarray, ...]:
    """Values, columns and counts of all keys of a chunk that reach ``bound``, however many there are."""
    n, room = z.shape[0], STAGED
    budgets, counts = np.full(n, -1), np.zeros(n, np.int64)
    while True:
        start = np.arange(n + 1) * room
        values, indices = np.empty(n * room, np.float32), np.empty(n * room, np.int64)
        _select(z, bias, extra, mode, (1.0, 0.0), budgets, bound, False, start, values, indices, counts)
        most = int(counts.max(initial=0))
        if most <= room:
            break
        room = most  # some row has more than was set aside: the same rows again, with room for the fullest
    out_values, out_indices = np.empty(counts.sum(), np.float32), np.empty(counts.sum(), np.int64)
    select.pack(start, counts, values, indices, out_values, out_indices)
    return out_values, out_indices, counts


def _select(z: Tensor, bias: np.ndarray, extra: np.ndarray, mode: int, weights: tuple[float, float], *rest) -> None:
    launch(select.select_rows, select.select_driver, z.shape[0], array(z), bias, extra, mode, weights, *rest)


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    return x if b_dec is None else x - b_dec


def _bias(b_enc: Tensor | None, width: int) -> np.ndarray:
    return np.zeros(width, np.float32) if b_enc is None else array(b_enc)

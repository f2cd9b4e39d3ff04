"""Compiled decoding and gradients of a ragged code: each decoder row is visited once, each latent has one owner."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from saelab.kernels.memory import recycled
from saelab.kernels.numba.launch import array, compiled, launch
from saelab.kernels.reference.backend import LatentGrads, Sorted, entry_grads

NONE = np.zeros(0, np.float32)


@compiled(contract=True)
def gather_rows(lo, hi, values, indices, ptr, data, offset, fresh, out):
    """``out[r] = sum over r's entries of value * (data[index] - offset)``, four at a time; added on unless fresh."""
    width, shift = data.shape[1], offset.size > 0
    for r in range(lo, hi):
        row, e, stop = out[r], ptr[r], ptr[r + 1]
        if fresh:
            row[:] = 0
        while e + 4 <= stop:
            a, b, c, d = values[e], values[e + 1], values[e + 2], values[e + 3]
            p, q, s, t = data[indices[e]], data[indices[e + 1]], data[indices[e + 2]], data[indices[e + 3]]
            if shift:
                for i in range(width):
                    o = offset[i]
                    row[i] += (a * (p[i] - o) + b * (q[i] - o)) + (c * (s[i] - o) + d * (t[i] - o))
            else:
                for i in range(width):
                    row[i] += (a * p[i] + b * q[i]) + (c * s[i] + d * t[i])
            e += 4
        while e < stop:
            a, p = values[e], data[indices[e]]
            if shift:
                for i in range(width):
                    row[i] += a * (p[i] - offset[i])
            else:
                for i in range(width):
                    row[i] += a * p[i]
            e += 1


@compiled(parallel=True)
def gather_driver(parts, count, values, indices, ptr, data, offset, fresh, out):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        gather_rows(lo, hi, values, indices, ptr, data, offset, fresh, out)


@compiled(contract=True, reassoc=True)
def dot(a, b):
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@compiled(contract=True, reassoc=True)
def dot_rows(lo, hi, grad, indices, ptr, data, out):
    """``out[e] = grad[row] . data[index]``."""
    width = data.shape[1]
    for r in range(lo, hi):
        g = grad[r]
        for e in range(ptr[r], ptr[r + 1]):
            row, total = data[indices[e]], np.float32(0)
            for i in range(width):
                total += g[i] * row[i]
            out[e] = total


@compiled(parallel=True)
def dot_driver(parts, count, grad, indices, ptr, data, out):
    for part in prange(parts):
        dot_rows(part * count // parts, (part + 1) * count // parts, grad, indices, ptr, data, out)


@compiled(contract=True, reassoc=True)
def error_rows(lo, hi, x, values, indices, ptr, data, none, bias, sse, recon, error, along):
    """Decode a token, compare, and go back over its decoder rows while they are still in the cache."""
    width = data.shape[1]
    for r in range(lo, hi):
        gather_rows(r, r + 1, values, indices, ptr, data, none, True, recon)
        total = np.float32(0)
        for i in range(width):
            recon[r, i] += bias[i]
            e = recon[r, i] - x[r, i]
            error[r, i] = e
            total += e * e
        sse[r] = total
        dot_rows(r, r + 1, error, indices, ptr, data, along)


@compiled(parallel=True)
def error_driver(parts, count, x, values, indices, ptr, data, none, bias, sse, recon, error, along):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        error_rows(lo, hi, x, values, indices, ptr, data, none, bias, sse, recon, error, along)


@compiled()
def sort_by_column(columns, row_ptr, order, ptr, rows):
    """Stable counting sort of a ragged code's entries by column: ``order``, the column pointers, and the rows."""
    ptr[:] = 0
    for c in columns:
        ptr[c + 1] += 1
    for j in range(1, ptr.size):
        ptr[j] += ptr[j - 1]
    following = ptr.copy()
    for r in range(row_ptr.size - 1):
        for e in range(row_ptr[r], row_ptr[r + 1]):
            at = following[columns[e]]
            order[at], rows[at] = e, r
            following[columns[e]] = at + 1


def by_column(columns: np.ndarray, row_ptr: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``order, column_ptr, rows``: the entries of each column, in row order."""
    order, rows, ptr = np.empty_like(columns), np.empty_like(columns), np.empty(width + 1, np.int64)
    sort_by_column(columns, row_ptr, order, ptr, rows)
    return order, ptr, rows


def decode(values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    recon = recycled(row_ptr.numel() - 1, W_dec.shape[1])
    code = array(values), array(indices), array(row_ptr)
    launch(gather_rows, gather_driver, recon.shape[0], *code, array(W_dec), NONE, True, array(recon))
    return recon if b_dec is None else recon.add_(b_dec.detach())


def value_grad(grad: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor) -> Tensor:
    out = torch.empty(indices.numel())
    launch(dot_rows, dot_driver, grad.shape[0], array(grad), array(indices), array(row_ptr), array(W_dec), array(out))
    return out


def decode_error(
    x: Tensor, values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d_in = x.shape
    sse, recon, error, along = torch.empty(n), recycled(n, d_in), recycled(n, d_in), torch.empty(values.numel())
    code = array(values), array(indices), array(row_ptr)
    bias = np.zeros(d_in, np.float32) if b_dec is None else array(b_dec)
    out = array(sse), array(recon), array(error), array(along)
    launch(error_rows, error_driver, n, array(x), *code, array(W_dec), NONE, bias, *out)
    return sse, recon, error, along


def by_latent(indices: Tensor, row_ptr: Tensor, d_sae: int) -> Sorted:
    order, ptr, rows = by_column(array(indices), array(row_ptr), d_sae)
    return Sorted(torch.from_numpy(order), torch.from_numpy(rows), torch.from_numpy(ptr))


def latent_grads(
    by: Sorted,
    values: Tensor,
    weight: Tensor | None = None,
    along: Tensor | None = None,
    extra: Tensor | None = None,
    error: Tensor | None = None,
    x: Tensor | None = None,
    offset: Tensor | None = None,
    W_dec: Tensor | None = None,
    measure: bool = False,
) -> LatentGrads:
    values = values[by.order]
    each = 1.0 if weight is None else weight[by.rows]
    dec = enc = bias = None
    if error is not None:
        dec = _sums(values * each, by, error, NONE)
    if x is not None:
        g = entry_grads(values, each, *(None if part is None else part[by.order] for part in (along, extra)))
        enc = _sums(g, by, x, NONE if offset is None else array(offset))
        bias = torch.empty(enc.shape[0])
        sum_columns(array(g), array(by.ptr), array(bias))
    return LatentGrads(dec, enc, bias)


def _sums(weights: Tensor, by: Sorted, data: Tensor, shift: np.ndarray) -> Tensor:
    out = recycled(by.ptr.numel() - 1, data.shape[1])
    entries = array(weights), array(by.rows), array(by.ptr)
    launch(gather_rows, gather_driver, out.shape[0], *entries, array(data), shift, True, array(out))
    return out


@compiled()
def sum_columns(weights, ptr, out):
    """``out[j] = sum of latent j's weights``, in float64."""
    for j in range(out.size):
        total = 0.0
        for e in range(ptr[j], ptr[j + 1]):
            total += weights[e]
        out[j] = total

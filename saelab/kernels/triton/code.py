"""Triton kernels on a ragged code: weighted sums of rows (decoding, latent gradients), dot products, and both fused.

Sums run over entries in a fixed order and one program owns each output row: no atomics, the same bits every time.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    values,
    indices,
    begin,
    end,
    target,
    data,
    offset,
    out,
    width,
    data_stride,
    out_stride,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """``out[target[p]] = sum of value * (data[index] - offset)`` over entries ``begin[p] .. end[p]``."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    first, stop = tl.load(begin + piece), tl.load(end + piece)
    row = tl.load(target + piece)
    shift = tl.zeros([BLOCK], tl.float32)
    if CENTRED:
        shift = tl.load(offset + column, mask=valid, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for e in range(first, stop, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        present = entry < stop
        weight = tl.load(values + entry, mask=present, other=0.0).to(tl.float32)
        index = tl.load(indices + entry, mask=present, other=0)
        place = data + index[:, None] * data_stride + column[None, :]
        rows = tl.load(place, mask=present[:, None] & valid[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * (rows - shift[None, :]), axis=0)
    # A negative target marks a surplus piece, which has nowhere to go.
    tl.store(out + row * out_stride + column, total, mask=column < tl.where(row >= 0, width, 0))


@triton.jit
def dot_kernel(
    grad,
    indices,
    row_ptr,
    data,
    out,
    width,
    grad_stride,
    data_stride,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[e] = grad[row] . data[index]`` for the entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    for e in range(first, stop, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        present = entry < stop
        index = tl.load(indices + entry, mask=present, other=0)
        total = tl.zeros([ENTRIES], tl.float32)
        for block in range(0, width, BLOCK):
            column = block + tl.arange(0, BLOCK)
            valid = column < width
            g = tl.load(grad + row * grad_stride + column, mask=valid, other=0.0).to(tl.float32)
            place = data + index[:, None] * data_stride + column[None, :]
            rows = tl.load(place, mask=present[:, None] & valid[None, :], other=0.0).to(tl.float32)
            total += tl.sum(rows * g[None, :], axis=1)
        tl.store(out + entry, total, mask=present)


@triton.jit
def error_kernel(
    x,
    values,
    indices,
    row_ptr,
    data,
    bias,
    sse,
    recon,
    error,
    along,
    width,
    x_stride,
    data_stride,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode one token, compare it, and revisit its decoder rows for ``error . row``; the token stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < width
    first, stop = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    decoded = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
    for e in range(first, stop, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        present = entry < stop
        weight = tl.load(values + entry, mask=present, other=0.0).to(tl.float32)
        index = tl.load(indices + entry, mask=present, other=0)
        place = data + index[:, None] * data_stride + column[None, :]
        rows = tl.load(place, mask=present[:, None] & valid[None, :], other=0.0).to(tl.float32)
        decoded += tl.sum(weight[:, None] * rows, axis=0)
    residual = decoded - tl.load(x + row * x_stride + column, mask=valid, other=0.0).to(tl.float32)
    residual = tl.where(valid, residual, 0.0)
    tl.store(sse + row, tl.sum(residual * residual, axis=0))
    tl.store(recon + row * width + column, decoded, mask=valid)
    tl.store(error + row * width + column, residual, mask=valid)
    for e in range(first, stop, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        present = entry < stop
        index = tl.load(indices + entry, mask=present, other=0)
        place = data + index[:, None] * data_stride + column[None, :]
        rows = tl.load(place, mask=present[:, None] & valid[None, :], other=0.0).to(tl.float32)
        tl.store(along + entry, tl.sum(rows * residual[None, :], axis=1), mask=present)


@triton.jit
def fill_kernel(values, indices, row_ptr, out, width, ENTRIES: tl.constexpr):
    """``out[row, indices[e]] = values[e]`` for the entries of one row; a row has no index twice."""
    row = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    for e in range(first, stop, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        present = entry < stop
        index = tl.load(indices + entry, mask=present, other=0)
        value = tl.load(values + entry, mask=present, other=0.0).to(tl.float32)
        tl.store(out + row * width + index, value, mask=present)


@triton.jit
def pick_kernel(dense, indices, row_ptr, out, width, ENTRIES: tl.constexpr):
    """``out[e] = dense[row, indices[e]]`` for the entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    for e in range(first, stop, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        present = entry < stop
        index = tl.load(indices + entry, mask=present, other=0)
        tl.store(out + entry, tl.load(dense + row * width + index, mask=present, other=0.0), mask=present)

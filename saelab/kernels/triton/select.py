"""Triton selection: the k-th largest key of a row by bisection over its bits, then a compaction in column order.

A key is a float32 mapped to an int32 of the same order (NaN as ``-inf``), so 32 counts decide the k-th largest exactly,
for any k and width, without sorting. Wide rows go through two levels: the k groups of GROUP consecutive columns with
the largest maxima (ties to the lowest group) hold all k winners, since those maxima are k distinct entries.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

PLAIN, MAGNITUDE, GRADIENT, MAGNITUDE_GRADIENT = (tl.constexpr(mode) for mode in range(4))
WHOLE = 4096  # columns that one program holds in registers
GROUP = 32


@triton.jit
def scored(z, bias, extra, weight0, weight1, MODE: tl.constexpr):
    """The comparison key as a float32; NaN becomes ``-inf``, and a negative zero a positive one."""
    value = z + bias
    if MODE == MAGNITUDE:
        value = tl.abs(value)
    elif MODE == GRADIENT:
        value = tl.where(value <= 0, 0.0, value) * (weight0 + weight1 * tl.abs(extra))
    elif MODE == MAGNITUDE_GRADIENT:
        value = tl.abs(value) * (weight0 + weight1 * tl.abs(extra))
    value = tl.where(value == 0, 0.0, value)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def ordered(key):
    """An int32 that sorts like the float32."""
    bits = key.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_scores(z, extra, bias, row, column, valid, z_stride, extra_stride, weight0, weight1, MODE: tl.constexpr):
    """``(z + bias, key)`` at the given rows and columns, in float32 whatever was stored."""
    raw = tl.load(z + row * z_stride + column, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
    other = raw
    if MODE >= GRADIENT:
        other = tl.load(extra + row * extra_stride + column, mask=valid, other=0.0).to(tl.float32)
    return raw + shift, scored(raw, shift, other, weight0, weight1, MODE)


@triton.jit
def group_maxima_kernel(
    z,
    extra,
    bias,
    out,
    n,
    width,
    n_groups,
    z_stride,
    extra_stride,
    weight0,
    weight1,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """``out[row, g]`` = largest key of columns ``g * SIZE .. (g + 1) * SIZE``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = group[None, :, None] * SIZE + tl.arange(0, SIZE)[None, None, :]
    valid = (row < n)[:, None, None] & (column < width)
    rows = row[:, None, None]
    _, key = load_scores(z, extra, bias, rows, column, valid, z_stride, extra_stride, weight0, weight1, MODE)
    best = tl.max(tl.where(valid, key, float("-inf")), axis=2)
    inside = (row < n)[:, None] & (group < n_groups)[None, :]
    tl.store(out + row[:, None] * n_groups + group[None, :], best, mask=inside)


@triton.jit
def group_keys_kernel(
    z,
    bias,
    groups,
    out,
    count,
    width,
    n_groups,
    z_stride,
    MODE: tl.constexpr,
    LISTED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """``out[i, :]`` = the ordered keys of group ``groups[i]``, numbered row after row; what is past the row is least.

    Without a list of groups, of all groups in turn.
    """
    i = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    listed = i < count
    group = i
    if LISTED:
        group = tl.load(groups + i, mask=listed, other=0)
    row = group // n_groups
    place = tl.arange(0, SIZE)[None, :]
    column = ((group - row * n_groups) * SIZE)[:, None] + place
    valid = listed[:, None] & (column < width)
    _, key = load_scores(z, z, bias, row[:, None], column, valid, z_stride, z_stride, 1.0, 0.0, MODE)
    tl.store(out + i[:, None] * SIZE + place, tl.where(valid, ordered(key), -2147483648), mask=listed[:, None])


@triton.jit
def kth_largest(key, k):
    """Per row the k-th largest int32 of ``key [ROWS, BLOCK]``, most significant bit first."""
    least = -2147483648
    at_least_zero = tl.sum((key >= 0).to(tl.int32), axis=1)
    found = tl.where(at_least_zero >= k, 0, least)
    for i in range(31):
        trial = found + (1 << (30 - i))
        reach = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        found = tl.where(reach >= k, trial, found)
    return found


@triton.jit
def select_kernel(
    z,
    extra,
    bias,
    groups,
    budgets,
    start,
    values,
    indices,
    n,
    width,
    held,
    z_stride,
    extra_stride,
    groups_stride,
    weight0,
    weight1,
    MODE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each row's ``budgets[row]`` winners, in column order, from ``start[row]``.

    With ``SIZE > 0`` only the ``held`` columns of the listed groups are looked at, else the first ``held`` columns.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    rows = row[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    valid = inside[:, None] & (place < held)
    if SIZE > 0:
        group = tl.load(groups + rows * groups_stride + place // SIZE, mask=valid, other=0)
        column = group * SIZE + place % SIZE
    else:
        column = place.to(tl.int64) + tl.zeros([ROWS, 1], tl.int64)
    valid = valid & (column < width)
    value, score = load_scores(z, extra, bias, rows, column, valid, z_stride, extra_stride, weight0, weight1, MODE)
    # Places outside the row rank below -inf.
    key = tl.where(valid, ordered(score), -2147483648)
    k = tl.load(budgets + row, mask=inside, other=0).to(tl.int32)
    last = kth_largest(key, k)
    above = (key > last[:, None]) & valid
    tied = (key == last[:, None]) & valid
    slots = k - tl.sum(above.to(tl.int32), axis=1)
    take = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= slots[:, None]))
    position = tl.cumsum(take.to(tl.int32), axis=1) - 1
    target = tl.load(start + row, mask=inside, other=0)[:, None] + position
    tl.store(values + target, value, mask=take)
    tl.store(indices + target, column, mask=take)


@triton.jit
def select_streamed_kernel(
    z,
    extra,
    bias,
    budgets,
    start,
    values,
    indices,
    width,
    z_stride,
    extra_stride,
    weight0,
    weight1,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``select_kernel`` for one row per program, reading the row anew for each bit: any k, any width."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(budgets + row).to(tl.int32)
    target = tl.load(start + row)
    found = tl.full([1, 1], -2147483648, tl.int32)
    for i in range(32):
        # The first count decides the sign: it asks for keys from 0 up.
        trial = tl.where(i == 0, tl.zeros([1, 1], tl.int32), found + (1 << ((31 - i) % 31)))
        reach = 0
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :].to(tl.int64)
            valid = column < width
            _, score = load_scores(z, extra, bias, row, column, valid, z_stride, extra_stride, weight0, weight1, MODE)
            reach += tl.sum((valid & (ordered(score) >= trial)).to(tl.int32))
        found = tl.where(reach >= k, trial, found)
    above = 0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        valid = column < width
        _, score = load_scores(z, extra, bias, row, column, valid, z_stride, extra_stride, weight0, weight1, MODE)
        above += tl.sum((valid & (ordered(score) > found)).to(tl.int32))
    slots = k - above
    done = 0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        valid = column < width
        value, score = load_scores(z, extra, bias, row, column, valid, z_stride, extra_stride, weight0, weight1, MODE)
        tied = valid & (ordered(score) == found)
        take = tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= slots)
        take = take | (valid & (ordered(score) > found))
        position = target + done + tl.cumsum(take.to(tl.int32), axis=1) - 1
        tl.store(values + position, value, mask=take)
        tl.store(indices + position, column, mask=take)
        slots -= tl.sum(tied.to(tl.int32))
        done += tl.sum(take.to(tl.int32))


@triton.jit
def reach_kernel(
    z,
    cut,
    bias,
    row_slack,
    column_slack,
    start,
    counts,
    values,
    indices,
    n,
    width,
    z_stride,
    SIGNED: tl.constexpr,
    SLACK: tl.constexpr,
    FILL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count, or with ``FILL`` write from ``start[row]``, the entries whose key exceeds ``cut[column]``.

    With ``SLACK`` an entry may be short of it by ``row_slack[row] * column_slack[column]``.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    done = tl.zeros([ROWS], tl.int64)
    target = tl.load(start + row, mask=inside, other=0)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :].to(tl.int64) + tl.zeros([ROWS, 1], tl.int64)
        valid = inside[:, None] & (column < width)
        value = tl.load(z + row[:, None] * z_stride + column, mask=valid, other=0.0).to(tl.float32)
        value += tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
        key = tl.abs(value) if SIGNED else value
        if SLACK:
            reach = tl.load(column_slack + column, mask=valid, other=0.0)
            key += tl.load(row_slack + row, mask=inside, other=0.0)[:, None] * reach
        # A NaN exceeds nothing.
        take = valid & (key > tl.load(cut + column, mask=valid, other=0.0).to(tl.float32))
        if FILL:
            position = (target + done)[:, None] + tl.cumsum(take.to(tl.int64), axis=1) - 1
            tl.store(values + position, value, mask=take)
            tl.store(indices + position, column, mask=take)
        done += tl.sum(take.to(tl.int64), axis=1)
    if not FILL:
        tl.store(counts + row, done, mask=inside)

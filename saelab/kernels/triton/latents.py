"""Triton kernels for the gradients of a dictionary: one program owns a latent and sums its entries in token order.

A latent with more than two segments' worth of entries is popular: programs that own fixed segments of the sorted
entries sum it in parts, and a second kernel adds the parts up. No atomics, and nothing that the host has to know.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
    latent,
    column,
    mine,
    d_dec,
    d_enc,
    d_bias,
    W_dec,
    dec,
    enc,
    bias,
    scale,
    squares,
    width,
    W_stride,
    DEC: tl.constexpr,
    ENC: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """Write one latent's sums; with MEASURE the part along its row leaves ``d_dec``, and norms are written.

    The bias counts only beside both matrices: after an activation its gradient has other parts.
    """
    here = column < tl.where(mine, width, 0)
    if MEASURE:
        if DEC:
            row = tl.load(W_dec + latent * W_stride + column, mask=here, other=0.0).to(tl.float32)
            norm = tl.sqrt(tl.sum(row * row, axis=0))
            inverse = 1.0 / tl.maximum(norm, 1.1754943508222875e-38)
            unit = row * inverse
            d_dec -= tl.sum(d_dec * unit, axis=0) * unit
            tl.store(scale + latent, inverse, mask=mine)
        total = tl.sum(d_dec * d_dec, axis=0) + tl.sum(d_enc * d_enc, axis=0)
        if DEC and ENC:
            total += d_bias * d_bias
        tl.store(squares + latent, total, mask=mine)
    if DEC:
        tl.store(dec + latent * width + column, d_dec, mask=here)
    if ENC:
        tl.store(enc + latent * width + column, d_enc, mask=here)
        tl.store(bias + latent, d_bias, mask=mine)


@triton.jit
def span(piece, part, ptr, latents, nnz, d_sae, SEGMENT: tl.constexpr):
    """The latent and the sorted entries of a program, and whether it owns the latent or a part of a popular one."""
    whole, in_part = piece < d_sae, piece >= d_sae
    start = (part // 2) * SEGMENT
    end = tl.minimum(start + SEGMENT, nnz)
    head = tl.load(latents + start, mask=in_part, other=0).to(tl.int64)
    tail = tl.load(latents + end - 1, mask=in_part, other=0).to(tl.int64)
    latent = tl.where(whole, piece, tl.where(part % 2 == 0, head, tail))
    first, stop = tl.load(ptr + latent), tl.load(ptr + latent + 1)
    # A popular latent at both ends of its segment is summed once, as the head.
    partial = in_part & (stop - first > 2 * SEGMENT) & ((part % 2 == 0) | (head != tail))
    owned = whole & (stop - first <= 2 * SEGMENT)
    first = tl.where(whole, first, tl.maximum(first, start))
    stop = tl.where(owned, stop, tl.where(partial, tl.minimum(stop, end), first))
    return latent, first, stop, owned, partial


@triton.jit
def latents_kernel(
    values,
    weight,
    along,
    extra,
    order,
    rows,
    ptr,
    latents,
    error,
    x,
    offset,
    W_dec,
    dec,
    enc,
    bias,
    scale,
    squares,
    dec_parts,
    enc_parts,
    bias_parts,
    nnz,
    d_sae,
    width,
    error_stride,
    x_stride,
    W_stride,
    SEGMENT: tl.constexpr,
    DEC: tl.constexpr,
    ENC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALONG: tl.constexpr,
    EXTRA: tl.constexpr,
    CENTRED: tl.constexpr,
    MEASURE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs ``0 .. d_sae`` own a latent, and two for each segment the popular latents at its head and its tail."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    part = tl.maximum(piece - d_sae, 0)
    latent, first, stop, owned, partial = span(piece, part, ptr, latents, nnz, d_sae, SEGMENT)
    shift = tl.zeros([BLOCK], tl.float32)
    if CENTRED:
        shift = tl.load(offset + column, mask=valid, other=0.0).to(tl.float32)
    d_dec, d_enc = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    d_bias = tl.zeros([ENTRIES], tl.float32)
    for e in range(first, stop, ENTRIES):
        at = e + tl.arange(0, ENTRIES)
        present = at < stop
        entry = tl.load(order + at, mask=present, other=0)
        token = tl.load(rows + at, mask=present, other=0)
        value = tl.load(values + entry, mask=present, other=0.0).to(tl.float32)
        each = tl.zeros([ENTRIES], tl.float32) + 1.0
        if WEIGHTED:
            each = tl.load(weight + token, mask=present, other=0.0).to(tl.float32)
        within = present[:, None] & valid[None, :]
        if DEC:
            data = tl.load(error + token[:, None] * error_stride + column[None, :], mask=within, other=0.0)
            d_dec += tl.sum((value * each)[:, None] * data.to(tl.float32), axis=0)
        if ENC:
            g = tl.zeros([ENTRIES], tl.float32)
            if ALONG:
                g += tl.load(along + entry, mask=present, other=0.0).to(tl.float32) * each
            if EXTRA:
                g += tl.load(extra + entry, mask=present, other=0.0).to(tl.float32)
            g = tl.where(present & (value != 0), g, 0.0)
            data = tl.load(x + token[:, None] * x_stride + column[None, :], mask=within, other=0.0)
            d_enc += tl.sum(g[:, None] * (data.to(tl.float32) - shift[None, :]), axis=0)
            d_bias += g
    total, here = tl.sum(d_bias, axis=0), column < tl.where(partial, width, 0)
    if DEC:
        tl.store(dec_parts + part * width + column, d_dec, mask=here)
    if ENC:
        tl.store(enc_parts + part * width + column, d_enc, mask=here)
        tl.store(bias_parts + part, total, mask=partial)
    finish(
        latent, column, owned, d_dec, d_enc, total, W_dec, dec, enc, bias, scale, squares,
        width, W_stride, DEC, ENC, MEASURE,
    )  # fmt: skip


@triton.jit
def parts_kernel(
    ptr,
    dec_parts,
    enc_parts,
    bias_parts,
    W_dec,
    dec,
    enc,
    bias,
    scale,
    squares,
    width,
    W_stride,
    SEGMENT: tl.constexpr,
    DEC: tl.constexpr,
    ENC: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the parts of the popular latents. A latent that begins inside a segment is that segment's tail."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    first, stop = tl.load(ptr + latent), tl.load(ptr + latent + 1)
    popular = stop - first > 2 * SEGMENT
    begin = first // SEGMENT
    end = tl.where(popular, (stop - 1) // SEGMENT + 1, begin)
    d_dec, d_enc, d_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), 0.0
    for segment in range(begin, end):
        part = 2 * segment + tl.where(segment * SEGMENT < first, 1, 0)
        if DEC:
            d_dec += tl.load(dec_parts + part * width + column, mask=valid, other=0.0)
        if ENC:
            d_enc += tl.load(enc_parts + part * width + column, mask=valid, other=0.0)
            d_bias += tl.load(bias_parts + part)
    finish(
        latent, column, popular, d_dec, d_enc, d_bias, W_dec, dec, enc, bias, scale, squares,
        width, W_stride, DEC, ENC, MEASURE,
    )  # fmt: skip

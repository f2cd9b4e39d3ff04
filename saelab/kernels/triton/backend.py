"""The Triton backend: the functions of :mod:`saelab.kernels.reference.backend`, for CUDA and ROCm tensors.

The encoder's product is the vendor library's, in chunks of rows; selection, decoding and gradients are ours.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.products import centred, products
from saelab.kernels.reference.backend import Effect, Ragged, gather_rows, largest_of_row, latent_sum, pointers, ranked  # noqa: F401
from saelab.kernels.triton import select
from saelab.kernels.triton.ragged import decode, decode_error, latent_grad, value_grad  # noqa: F401
from saelab.kernels.triton.residual import pursue, pursue_backward  # noqa: F401
from saelab.kernels.triton.shapes import group_size, maxima_shape, power, streamed_block, whole_shape

UNWEIGHTED = (1.0, 0.0)
MARGIN = 8  # a batch budget first looks at this many times the average per row
MODES = {False: select.PLAIN.value, True: select.MAGNITUDE.value}


def topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    signed: bool,
    effect: Effect | None = None,
) -> Ragged:
    values, indices, start = _best(x, W_enc, b_enc, b_dec, k, signed, effect)
    return values if signed else values.relu_(), indices, start


def _best(x, W_enc, b_enc, b_dec, k, signed, effect=None) -> Ragged:
    """:func:`topk` with values that are not clipped."""
    n, mode, weights, effects = x.shape[0], MODES[signed], UNWEIGHTED, None
    if effect is not None:
        mode, weights = (select.MAGNITUDE_GRADIENT if signed else select.GRADIENT).value, effect.weights
        effects = effect.grads @ effect.W_dec.T
    values = torch.empty(n * k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n * k, dtype=torch.int64, device=x.device)
    budgets = torch.full((n,), k, dtype=torch.int64, device=x.device)
    start, bias = torch.arange(n + 1, device=x.device) * k, _bias(b_enc, W_enc.shape[1], x)
    for row, z in products(centred(x, b_dec), W_enc):
        rows = slice(row, row + z.shape[0])
        extra = z if effects is None else effects[rows]
        choose(z, extra, bias, mode, weights, budgets[rows], k, start[row:], values, indices)
    return values.to(x.dtype), indices, start


def choose(
    z: Tensor,
    extra: Tensor,
    bias: Tensor,
    mode: int,
    weights: tuple[float, float],
    budgets: Tensor,
    most: int,
    start: Tensor,
    values: Tensor,
    indices: Tensor,
) -> None:
    """Launch the selection of ``budgets[row] <= most`` winners per row, in the form that suits the shape."""
    n, width = z.shape
    if n == 0 or most == 0:
        return
    strides, size, out = (z.stride(0), extra.stride(0)), group_size(width), (values, indices)
    if width <= select.WHOLE:
        groups, held, size = start, width, 0
    elif most * size * 2 <= width and power(most * size) <= 2 * select.WHOLE:
        groups, held = _winning_groups(z, extra, bias, mode, weights, most, size), most * size
    else:
        operands = z, extra, bias, budgets, start, *out, width, *strides, *weights
        select.select_streamed_kernel[(n,)](*operands, MODE=mode, **streamed_block(width))
        return
    shape, sizes = whole_shape(n, held), (n, width, held)
    operands = z, extra, bias, groups, budgets, start, *out, *sizes, *strides, most, *weights
    select.select_kernel[(-(-n // shape["ROWS"]),)](*operands, MODE=mode, SIZE=size, **shape)


def _winning_groups(z, extra, bias, mode, weights, k, size) -> Tensor:
    """Per row the k groups of ``size`` columns with the largest maxima, ties to the lowest: ``[n, k]``."""
    n, width = z.shape
    n_groups = -(-width // size)
    maxima = torch.empty(n, n_groups, dtype=torch.float32, device=z.device)
    shape = maxima_shape(n, n_groups, size)
    grid = -(-n // shape["ROWS"]), -(-n_groups // shape["GROUPS"])
    select.group_maxima_kernel[grid](
        z, extra, bias, maxima, n, width, n_groups, z.stride(0), extra.stride(0), *weights, MODE=mode, **shape
    )
    groups, unused = torch.empty(n * k, dtype=torch.int64, device=z.device), torch.empty_like(maxima)
    budgets, start = torch.full((n,), k, dtype=torch.int64, device=z.device), torch.arange(n, device=z.device) * k
    nothing = torch.zeros(n_groups, device=z.device)
    choose(maxima, maxima, nothing, MODES[False], UNWEIGHTED, budgets, k, start, unused.view(-1), groups)
    return groups.view(n, k)


def batch(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool) -> Ragged:
    """The best few of each row, then the best of those; rows that may hold more are read again, and only those."""
    n, d_sae = x.shape[0], W_enc.shape[1]
    each = min(d_sae, max(32, MARGIN * -(-budget // n)))
    values, indices, _ = _best(x, W_enc, b_enc, b_dec, each, signed)
    rows = torch.arange(n, device=x.device).repeat_interleave(each)
    keys = ranked(values, signed)
    if each < d_sae:
        bound = keys.topk(budget).values[-1]
        fullest = (keys.view(n, each).amin(1) >= bound).nonzero().squeeze(1)
        if fullest.numel():
            found, where, ptr = _reaching(x[fullest], W_enc, b_enc, b_dec, float(bound), MODES[signed])
            keep = ~torch.isin(rows, fullest)
            rows = torch.cat([rows[keep], fullest.repeat_interleave(ptr.diff())])
            values, indices = torch.cat([values[keep], found]), torch.cat([indices[keep], where])
    in_order = (rows * d_sae + indices).argsort()
    best = in_order[largest_of_row(ranked(values[in_order], signed), budget)]
    values = values[best] if signed else values[best].relu_()
    return values, indices[best], pointers(torch.bincount(rows[best], minlength=n))


def latent(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budgets: Tensor, signed: bool
) -> Ragged:
    n, start = x.shape[0], pointers(budgets)
    total, most = int(start[-1]), int(budgets.max())
    values = torch.empty(total, dtype=torch.float32, device=x.device)
    tokens = torch.empty(total, dtype=torch.int64, device=x.device)
    nothing = torch.zeros(n, device=x.device)
    for row, z in products(W_enc.T, centred(x, b_dec).T):  # z [latents, n]
        rows = slice(row, row + z.shape[0])
        if b_enc is not None:
            z += b_enc[rows, None]
        choose(z, z, nothing, MODES[signed], UNWEIGHTED, budgets[rows], most, start[row:], values, tokens)
    order = tokens.argsort(stable=True)
    latents = torch.arange(W_enc.shape[1], device=x.device).repeat_interleave(budgets, output_size=total)
    values = values[order].to(x.dtype)
    row_ptr = pointers(torch.bincount(tokens, minlength=n))
    return values if signed else values.relu_(), latents[order], row_ptr


def threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, cut: Tensor, signed: bool
) -> Ragged:
    mode = select.MAGNITUDE_ABOVE if signed else select.ABOVE
    return _reaching(x, W_enc, b_enc, b_dec, 0.0, mode.value, cut.contiguous())


def _reaching(x, W_enc, b_enc, b_dec, bound, mode, cut=None) -> Ragged:
    """All entries whose key reaches ``bound``: counted, then written."""
    bias = _bias(b_enc, W_enc.shape[1], x)
    values, indices, counts = [], [], []
    for _, z in products(centred(x, b_dec), W_enc):
        n, width = z.shape
        extra = z if cut is None else cut.expand(n, width)
        shape = whole_shape(n, min(width, 1024))
        grid, count = (max(1, -(-n // shape["ROWS"])),), torch.zeros(n, dtype=torch.int64, device=x.device)
        found, where = torch.empty(0, device=x.device), torch.empty(0, dtype=torch.int64, device=x.device)
        for fill in (False, True):
            start = pointers(count)
            if fill:
                found = torch.empty(int(start[-1]), dtype=torch.float32, device=x.device)
                where = torch.empty(int(start[-1]), dtype=torch.int64, device=x.device)
            select.reach_kernel[grid](
                z,
                extra,
                bias,
                start,
                count,
                found,
                where,
                n,
                width,
                z.stride(0),
                extra.stride(0),
                bound,
                MODE=mode,
                FILL=fill,
                **shape,
            )
        values.append(found.to(x.dtype))
        indices.append(where)
        counts.append(count)
    return torch.cat(values), torch.cat(indices), pointers(torch.cat(counts))


def _bias(b_enc: Tensor | None, width: int, like: Tensor) -> Tensor:
    return torch.zeros(width, dtype=like.dtype, device=like.device) if b_enc is None else b_enc.contiguous()

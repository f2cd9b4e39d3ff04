"""The Triton backend: the functions of :mod:`saelab.kernels.reference.backend`, for CUDA and ROCm tensors.

The encoder's product is the vendor library's, in chunks of rows; selection, decoding and gradients are ours. Entries of
a selection come in ascending order.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.candidates import positions_of_largest
from saelab.kernels.dense import DenseOrSparse
from saelab.kernels.products import centred, wide_products
from saelab.kernels.ragged import pointers, row_pointers
from saelab.kernels.reference.backend import Effect, Ragged, Slack, gather_rows  # noqa: F401
from saelab.kernels.triton import ragged, select
from saelab.kernels.triton.launch import launch
from saelab.kernels.triton.residual import pursue, pursue_backward  # noqa: F401
from saelab.kernels.triton.shapes import group_size, list_shape, maxima_shape, power, streamed_block, whole_shape

UNWEIGHTED = (1.0, 0.0)
MODES = {False: select.PLAIN.value, True: select.MAGNITUDE.value}
LEAST_GROUP = 4
ASCENDING = True  # a row's entries come in the order of their latents
# From the memory traffic of gathered rows and the arithmetic of products on an H200; not measured.
DENSE = {True: 1 / 64, False: 1 / 16}

on_codes = DenseOrSparse(ragged, ragged.fill, ragged.pick, DENSE)
decode, value_grad, decode_error = on_codes.decode, on_codes.value_grad, on_codes.decode_error
by_latent, latent_grads = on_codes.by_latent, on_codes.latent_grads


def topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    signed: bool,
    effect: Effect | None = None,
    clip: bool = True,
) -> Ragged:
    n, mode, weights, effects = x.shape[0], MODES[signed], UNWEIGHTED, None
    if effect is not None:
        mode, weights = (select.MAGNITUDE_GRADIENT if signed else select.GRADIENT).value, effect.weights
        effects = wide_products(effect.grads, effect.W_dec.T)  # in the same chunks as the pre-activations
    values = torch.empty(n * k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n * k, dtype=torch.int64, device=x.device)
    budgets = torch.full((n,), k, dtype=torch.int64, device=x.device)
    start, bias = torch.arange(n + 1, device=x.device) * k, _bias(b_enc, W_enc.shape[1], x)
    for row, z in wide_products(centred(x, b_dec), W_enc):
        extra = z if effects is None else next(effects)[1]
        choose(z, extra, bias, mode, weights, budgets[row : row + z.shape[0]], k, start[row:], values, indices)
    return values if signed or not clip else values.relu_(), indices, start


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
    while size > LEAST_GROUP and power(most * size) > 2 * select.WHOLE:
        size //= 2  # smaller groups fit one program for larger budgets
    if width <= select.WHOLE:
        groups, held, size = start, width, 0
    elif most * size * 2 <= width and power(most * size) <= 2 * select.WHOLE:
        groups, held = _winning_groups(z, extra, bias, mode, weights, most, size), most * size
    else:
        operands = z, extra, bias, budgets, start, *out, width, *strides, *weights
        launch(select.select_streamed_kernel, (n,), *operands, MODE=mode, **streamed_block(width))
        return
    shape, sizes = whole_shape(n, held), (n, width, held)
    operands = z, extra, bias, groups, budgets, start, *out, *sizes, *strides, most, *weights
    launch(select.select_kernel, (-(-n // shape["ROWS"]),), *operands, MODE=mode, SIZE=size, **shape)


def _winning_groups(z, extra, bias, mode, weights, k, size) -> Tensor:
    """Per row the k groups of ``size`` columns with the largest maxima, ties to the lowest: ``[n, k]``."""
    n, device = z.shape[0], z.device
    maxima = _maxima(z, extra, bias, mode, weights, size)
    groups, unused = torch.empty(n * k, dtype=torch.int64, device=device), torch.empty_like(maxima)
    budgets, start = torch.full((n,), k, dtype=torch.int64, device=device), torch.arange(n, device=device) * k
    nothing = torch.zeros(maxima.shape[1], device=device)
    choose(maxima, maxima, nothing, MODES[False], UNWEIGHTED, budgets, k, start, unused.view(-1), groups)
    return groups.view(n, k)


def _maxima(z: Tensor, extra: Tensor, bias: Tensor, mode: int, weights: tuple[float, float], size: int) -> Tensor:
    """The largest key of each group of ``size`` columns, ``[n, groups]``; with groups of 1, the keys."""
    n, width = z.shape
    n_groups = -(-width // size)
    maxima = torch.empty(n, n_groups, dtype=torch.float32, device=z.device)
    shape = maxima_shape(n, n_groups, size)
    grid = -(-n // shape["ROWS"]), -(-n_groups // shape["GROUPS"])
    if n:
        sizes = n, width, n_groups, z.stride(0), extra.stride(0)
        launch(select.group_maxima_kernel, grid, z, extra, bias, maxima, *sizes, *weights, MODE=mode, **shape)
    return maxima


def batch(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool) -> Ragged:
    """The best of each chunk of rows and of what earlier chunks left: ``budget`` entries each time, sizes known.

    One threshold over all rows does not care how many entries a row spends, and nothing waits for the GPU.
    """
    (n, d_sae), bias = (x.shape[0], W_enc.shape[1]), _bias(b_enc, W_enc.shape[1], x)
    keys, values = (torch.empty(0, dtype=dtype, device=x.device) for dtype in (torch.int32, torch.float32))
    flat = torch.empty(0, dtype=torch.int64, device=x.device)
    for row, z in wide_products(centred(x, b_dec), W_enc):
        rows, columns, found = _best_of_chunk(z, bias, MODES[signed], min(budget, z.numel()))
        keys = torch.cat([keys, found])
        values = torch.cat([values, z[rows, columns] + bias[columns]])
        flat = torch.cat([flat, (rows + row) * d_sae + columns])
        if keys.numel() > budget:
            best = positions_of_largest(keys, budget)
            keys, values, flat = keys[best], values[best], flat[best]
    rows = flat.div(d_sae, rounding_mode="floor")
    return values if signed else values.relu_(), flat - rows * d_sae, row_pointers(rows, n)


def _best_of_chunk(z: Tensor, bias: Tensor, mode: int, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and ordered keys of the ``budget`` largest keys of a chunk, ties to the lowest (row, column).

    The ``budget`` groups of columns with the largest maxima hold all winners: those maxima are as many entries.
    """
    (n, width), size = z.shape, group_size(z.shape[1])
    while size > 1 and budget * size * 2 > n * width:
        size //= 2
    n_groups, groups = -(-width // size), None
    if size > 1:
        maxima = _maxima(z, z, bias, mode, UNWEIGHTED, size)
        groups = positions_of_largest(maxima.view(-1), budget)
    count = n * n_groups if groups is None else budget
    keys = torch.empty(count * size, dtype=torch.int32, device=z.device)
    shape = list_shape(count, size)
    operands = z, bias, z if groups is None else groups, keys, count, width, n_groups, z.stride(0)
    grid = (max(1, -(-count // shape["GROUPS"])),)
    launch(select.group_keys_kernel, grid, *operands, MODE=mode, LISTED=groups is not None, **shape)
    best = positions_of_largest(keys, budget)
    member = best.div(size, rounding_mode="floor")
    chosen = member if groups is None else groups[member]
    rows = chosen.div(n_groups, rounding_mode="floor")
    return rows, (chosen - rows * n_groups) * size + (best - member * size), keys[best]


def latent(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    budgets: Tensor,
    signed: bool,
    sizes: tuple[int, int] | None = None,
) -> Ragged:
    """``sizes`` are bounds on the sum of the budgets and on the largest; what is too much lies behind the last row."""
    (n, d_sae), start = (x.shape[0], W_enc.shape[1]), pointers(budgets)
    total, most = (int(start[-1]), int(budgets.max())) if sizes is None else sizes
    start = start.clamp_max_(total)  # no program may write behind the end, whatever the caller says
    budgets = start.diff()
    values = torch.empty(total, dtype=torch.float32, device=x.device)
    tokens = torch.full((total,), n, dtype=torch.int64, device=x.device)
    nothing = torch.zeros(n, device=x.device)
    for row, z in wide_products(W_enc.T, centred(x, b_dec).T):  # z [latents, n]
        rows = slice(row, row + z.shape[0])
        if b_enc is not None:
            z += b_enc[rows, None]
        choose(z, z, nothing, MODES[signed], UNWEIGHTED, budgets[rows], most, start[row:], values, tokens)
    tokens, order = tokens.sort(stable=True)
    latents = torch.searchsorted(start, order, right=True).sub_(1).clamp_max_(d_sae - 1)
    values = values[order]
    return values if signed else values.relu_(), latents, row_pointers(tokens, n)


def threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    cut: Tensor,
    signed: bool,
    slack: Slack | None = None,
) -> Ragged | None:
    """All entries above ``cut`` (or short of it by less than ``slack``): counted, then written.

    How many there are must be known before memory is taken for them: one wait for the GPU for each chunk.
    """
    bias, cut = _bias(b_enc, W_enc.shape[1], x), cut.contiguous()
    values, indices, counts = [], [], []
    for row, z in wide_products(centred(x, b_dec), W_enc):
        n, width = z.shape
        shape = whole_shape(n, min(width, 1024))
        grid, count = (max(1, -(-n // shape["ROWS"])),), torch.zeros(n, dtype=torch.int64, device=x.device)
        found, where = torch.empty(0, device=x.device), torch.empty(0, dtype=torch.int64, device=x.device)
        slacks = (cut, cut) if slack is None else (slack.rows[row:], slack.latents)
        modes = {"SIGNED": signed, "SLACK": slack is not None}
        for fill in (False, True):
            start = pointers(count)
            if fill:
                total = int(start[-1])
                if slack is not None and total > slack.most * n * width:
                    return None
                found = torch.empty(total, dtype=torch.float32, device=x.device)
                where = torch.empty(total, dtype=torch.int64, device=x.device)
            lists = z, cut, bias, *slacks, start, count, found, where
            launch(select.reach_kernel, grid, *lists, n, width, z.stride(0), FILL=fill, **modes, **shape)
        values.append(found)
        indices.append(where)
        counts.append(count)
    return torch.cat(values), torch.cat(indices), pointers(torch.cat(counts))


def _bias(b_enc: Tensor | None, width: int, like: Tensor) -> Tensor:
    return torch.zeros(width, device=like.device) if b_enc is None else b_enc.float().contiguous()

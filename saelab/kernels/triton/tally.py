"""Triton kernels for the numbers of a training step: who fired, and a handful of sums.

Neither is large: a GPU spends less on one of them than on starting the dozens of small operations that they replace.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saelab.kernels.triton.launch import launch

ENTRIES, BLOCK = 64, 1024


@triton.jit(do_not_specialize=["tokens", "limit"])
def firing_kernel(values, order, ptr, since, dead, counts, tokens, limit, ENTRIES: tl.constexpr):
    """How often a latent fired, the tokens since it last did, and whether these exceed ``limit``."""
    latent = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(ptr + latent), tl.load(ptr + latent + 1)
    fired = tl.zeros([ENTRIES], tl.int32)
    for e in range(first, stop, ENTRIES):
        at = e + tl.arange(0, ENTRIES)
        entry = tl.load(order + at, mask=at < stop, other=0)
        value = tl.load(values + entry, mask=at < stop, other=0.0)
        fired += tl.where(value != 0, 1, 0)
    count = tl.sum(fired, axis=0)
    silent = tl.where(count > 0, 0, tl.load(since + latent) + tokens)
    tl.store(since + latent, silent)
    tl.store(dead + latent, tl.where(silent > limit, 1, 0))
    tl.store(counts + latent, count)


@triton.jit
def total(data, size, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a vector, or of its squares, in float64."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        part = tl.load(data + place, mask=place < size, other=0).to(tl.float64)
        lanes += part * part if SQUARED else part
    return tl.sum(lanes, axis=0)


@triton.jit(do_not_specialize=["starting"])
def report_kernel(
    errors,
    counts,
    dead,
    squares,
    bias,
    length,
    terms,
    first,
    failed,
    numbers,
    factor,
    n,
    d_sae,
    d_in,
    n_terms,
    starting,
    unit,
    most,
    limit,
    BLOCK: tl.constexpr,
):
    """Write ``numbers``: FVU, loss, L0, energy, norm of the gradient, dead latents; and the factor and the flag."""
    fvu = total(errors, n, False, BLOCK) * unit
    loss = fvu + total(terms, n_terms, False, BLOCK)
    norm = tl.sqrt(total(squares, d_sae, False, BLOCK) + total(bias, d_in, True, BLOCK))
    size = tl.load(length).to(tl.float64)
    energy = size * size * unit
    reference = tl.where(starting != 0, fvu, tl.load(first))
    tl.store(first, reference)
    ratio = fvu / tl.maximum(tl.maximum(energy, reference), 1.0)
    good = (loss - loss == 0.0) & (norm - norm == 0.0) & (ratio <= limit)
    tl.store(failed, tl.where(good, tl.load(failed), 1.0))
    tl.store(factor, tl.minimum(most / (norm + 1e-6), 1.0).to(tl.float32))
    tl.store(numbers, loss)
    tl.store(numbers + 1, fvu)
    tl.store(numbers + 2, total(counts, d_sae, False, BLOCK) / n)
    tl.store(numbers + 3, energy)
    tl.store(numbers + 4, norm)
    tl.store(numbers + 5, total(dead, d_sae, False, BLOCK))


def count_fired(
    values: Tensor, order: Tensor, ptr: Tensor, since: Tensor, dead: Tensor, counts: Tensor, tokens: int, limit: int
) -> None:
    """See :func:`saelab.kernels.tally.count_fired`."""
    tensors = values, order, ptr, since, dead, counts
    launch(firing_kernel, (since.numel(),), *tensors, tokens, limit, ENTRIES=ENTRIES, num_warps=1)


def report(*tensors: Tensor, sizes: tuple[int, int, int, int, int], scalars: tuple[float, float, float]) -> None:
    """See :func:`saelab.kernels.tally.report`."""
    launch(report_kernel, (1,), *tensors, *sizes, *scalars, BLOCK=BLOCK, num_warps=8)

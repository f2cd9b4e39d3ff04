"""Adam in one pass over memory; see :mod:`saelab.kernels.adam` for the update."""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saelab.kernels.triton.launch import launch
from saelab.kernels.triton.shapes import sweep_shape


@triton.jit
def random_round(x, place, seed):
    """A float32 block in bfloat16, up or down in proportion, by bits that depend on place and seed."""
    bits = (place ^ seed).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    drawn = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, drawn.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed_first", "seed_second"])
def adam_kernel(
    weight,
    grad,
    first,
    second,
    rows,
    factor,
    skip,
    numel,
    width,
    beta1,
    beta2,
    rate,
    root,
    eps,
    seed_first,
    seed_second,
    ROWS: tl.constexpr,
    FACTOR: tl.constexpr,
    SKIP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    last = numel
    if SKIP:
        last = tl.where(tl.load(skip) == 0, numel, 0)
    valid = place < last
    w = tl.load(weight + place, mask=valid, other=0.0)
    g = tl.load(grad + place, mask=valid, other=0.0)
    if ROWS:
        w *= tl.load(rows + place // width, mask=valid, other=0.0)
    if FACTOR:
        g *= tl.load(factor)
    m = tl.load(first + place, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(second + place, mask=valid, other=0.0).to(tl.float32)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w -= rate * m / (tl.sqrt(v) / root + eps)
    tl.store(weight + place, w, mask=valid)
    if HALF:
        tl.store(first + place, random_round(m, place, seed_first), mask=valid)
        tl.store(second + place, random_round(v, place, seed_second), mask=valid)
    else:
        tl.store(first + place, m, mask=valid)
        tl.store(second + place, v, mask=valid)


def update(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    rows: Tensor | None,
    factor: Tensor | None,
    skip: Tensor | None,
    numbers: tuple[float, float, float, float, float],
    seeds: tuple[int, int],
) -> None:
    """One step on contiguous tensors, ``rows`` over the first axis of ``weight``."""
    shape, numel = sweep_shape(), weight.numel()
    flags = {"ROWS": rows is not None, "FACTOR": factor is not None, "SKIP": skip is not None}
    stand_in = [weight if t is None else t for t in (rows, factor, skip)]  # for what a flag turns off
    sizes = numel, numel // max(weight.shape[0], 1)
    grid = (-(-numel // shape["BLOCK"]),)
    tensors = weight, grad, first, second, *stand_in
    launch(adam_kernel, grid, *tensors, *sizes, *numbers, *seeds, **flags, HALF=first.dtype != weight.dtype, **shape)

"""Gradients in a model of any precision. In float16, whose smallest number is 6e-8, they are computed scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saelab.errors import UserError

# A logit's gradient in a residual stream of norm 1e4, or by one of 250,000 logits of a mean, is below 1e-5, where
# float16 loses precision. Scaled by this it has all of it, and may be 6e4 times as large as that until it overflows.
SCALE, STEP, SMALLEST = 2.0**10, 2.0**4, 2.0**-14


def gradients_of(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """The gradients of the sum of ``outputs``, weighted by ``seeds``, at ``inputs``; None where one has none.

    Where an input is in float16 they are in float32. UserError where they overflow float16 whatever the scale.
    """
    seeds = [torch.ones_like(x) for x in outputs] if seeds is None else seeds
    if all(x.dtype != torch.float16 for x in inputs):
        return list(torch.autograd.grad(outputs, inputs, seeds, retain_graph=retain_graph, allow_unused=True))
    scale = SCALE
    while scale >= SMALLEST:
        scaled = [seed * scale for seed in seeds]
        found = torch.autograd.grad(outputs, inputs, scaled, retain_graph=True, allow_unused=True)
        if all(g is None or bool(g.isfinite().all()) for g in found):
            return [None if g is None else g.float() / scale for g in found]
        scale /= STEP
    raise UserError(
        "the model's gradients are not finite in float16; load it in bfloat16 or float32 (--model-dtype bfloat16)"
    )


def gradient_of(output: Tensor, at: Tensor, *, retain_graph: bool = False) -> Tensor:
    """The gradient of the sum of ``output`` at ``at``: zeros where it has none."""
    (found,) = gradients_of([output], [at], retain_graph=retain_graph)
    return torch.zeros_like(at) if found is None else found

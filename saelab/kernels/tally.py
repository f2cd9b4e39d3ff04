"""The numbers of a training step on a GPU in two kernels, where :class:`saelab.kernels.RowSums` was filled."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saelab.kernels.by_latent import ByLatent
from saelab.kernels.dispatch import implementation
from saelab.kernels.reference.backend import Sorted

NAMES = ("loss", "fvu", "l0", "energy", "grad_norm", "dead")


class Fired(NamedTuple):
    """By latent, int32 ``[d_sae]``: whether it is dead (0 or 1), and on how many tokens it fired."""

    dead: Tensor
    counts: Tensor


def count_fired(values: Tensor, by: ByLatent, since: Tensor, tokens: int, limit: int) -> Fired | None:
    """Bring ``since [d_sae]``, the tokens since a latent fired, up to date with a batch of ``tokens``.

    ``values [nnz]`` are those of the code that ``by`` sorts. Dead are latents with ``since > limit``. None, and nothing
    done, for a code that is not sparse, which is not sorted.
    """
    from saelab.kernels.triton import tally

    entries = by.sorted(implementation(values))
    if not isinstance(entries, Sorted):
        return None
    dead, counts = (torch.empty(since.numel(), dtype=torch.int32, device=since.device) for _ in range(2))
    tally.count_fired(values.detach().contiguous(), entries.order, entries.ptr, since, dead, counts, tokens, limit)
    return Fired(dead, counts)


class Report(NamedTuple):
    """``numbers [6]`` (float64) are those of ``NAMES``; ``factor`` clips the gradient."""

    numbers: Tensor
    factor: Tensor


def report(
    errors: Tensor,
    fired: Fired,
    squares: Tensor,
    bias: Tensor,
    length: Tensor,
    terms: Tensor | None,
    first: Tensor,
    failed: Tensor,
    *,
    variance: float,
    most: float | None,
    limit: float,
    starting: bool,
) -> Report:
    """The numbers of a step, the factor that brings the gradient's norm down to ``most``, and the flag of a failure.

    ``errors [n]`` are the squared errors, ``squares [d_sae]`` and ``bias [m]`` make the norm of the gradient, and
    ``length`` is the norm of the whole batch. ``terms`` are what the loss has besides the FVU. ``first`` (float64) is
    the FVU of the first batch, written by the step that is ``starting``; ``failed`` (float32) becomes 1 where the loss
    or the norm is not finite or the FVU exceeds ``limit`` times the largest of 1, ``first`` and the energy.
    """
    from saelab.kernels.triton import tally

    numbers = torch.empty(len(NAMES), dtype=torch.float64, device=errors.device)
    factor = torch.empty((), device=errors.device)
    extra = errors if terms is None else terms  # what is not there has no entries
    tensors = (
        errors,
        fired.counts,
        fired.dead,
        squares,
        bias.contiguous(),
        length,
        extra,
        first,
        failed,
        numbers,
        factor,
    )
    sizes = errors.numel(), squares.numel(), bias.numel(), 0 if terms is None else terms.numel(), int(starting)
    scalars = 1 / (errors.numel() * variance), math.inf if most is None else most, limit
    tally.report(*tensors, sizes=sizes, scalars=scalars)
    return Report(numbers, factor)

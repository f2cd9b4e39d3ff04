"""The one place where kernels are launched: on the GPU that holds their tensors, whichever is current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """Run a Triton kernel over a grid of programs; a grid with a side of 0 is nothing to do.

    Triton launches on the current device, where the pointers of another one mean nothing.
    """
    if 0 not in grid:
        with guard(next(operand for operand in operands if isinstance(operand, Tensor))):
            kernel[grid](*operands, **constants)


def guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one; nothing on the CPU, where kernels are interpreted."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

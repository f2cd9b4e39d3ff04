"""The arithmetic of the product that selects latents.

``fp32`` takes it in float32 as it stands. ``bf16`` rounds its operands to bfloat16, sums in float32 and keeps float32
sums; a few more latents than wanted are taken from it, their pre-activations are computed in float32, and the best of
those are the selection. So no value that is decoded or differentiated is ever rounded, and what a selection may miss
is a latent that rounding moves past all the surplus ones. ``auto`` is ``bf16`` on GPUs that multiply bfloat16, and
``fp32`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["auto", "fp32", "bf16"]
HALVES = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)  # the first compute capability with bfloat16 products; AMD's numbers are higher
_precision: ContextVar[Precision | None] = ContextVar("saelab_precision", default=None)


@contextmanager
def use_precision(precision: Precision) -> Iterator[None]:
    """Select latents in this arithmetic inside the block: ``auto``, ``fp32`` (the default) or ``bf16``."""
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(get_args(Precision))}")
    token = _precision.set(precision)
    try:
        yield
    finally:
        _precision.reset(token)


@contextmanager
def default_precision(precision: Precision) -> Iterator[None]:
    """Select latents in this arithmetic inside the block, unless a :func:`use_precision` around it says another."""
    with use_precision(_precision.get() or precision):
        yield


def arithmetic(precision: Precision, device: torch.device | str) -> Literal["fp32", "bf16"]:
    """What ``precision`` comes to on a device."""
    if precision == "auto":
        return "bf16" if _pays(str(device)) else "fp32"
    return precision


def rounds(x: Tensor) -> bool:
    """Whether selection on ``x`` rounds the operands of its product to bfloat16 here.

    Also inside ``torch.autocast`` to bfloat16; float16 would overflow on activations of some models.
    """
    if x.dtype != torch.float32:
        return False
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return True
    return arithmetic(current(), x.device) == "bf16"


def in_halves(like: Tensor) -> bool:
    """Whether large products on ``like``'s device are to be taken in bfloat16, with operands split into two numbers."""
    return arithmetic(current(), like.device) == "bf16"


def current() -> Precision:
    """The precision of this context, to take it to another thread."""
    return _precision.get() or "fp32"


@cache
def _pays(device: str) -> bool:
    if torch.device(device).type != "cuda" or not sums_in_float32(device):
        return False
    return torch.cuda.get_device_capability(device) >= AMPERE


@cache
def sums_in_float32(device: str) -> bool:
    """Whether ``torch.mm`` gives float32 sums of half-precision operands on this device (CUDA, from PyTorch 2.8 on)."""
    if torch.device(device).type != "cuda":
        return False
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # an older PyTorch, or a build without it
        return False
    return True

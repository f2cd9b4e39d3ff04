"""Names of devices, such as ``cuda:1`` or ``auto``, and what a kind of device lacks."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from saelab.errors import UserError, first_line

KINDS = ("cpu", "cuda", "mps")
# What weights and stored activations are kept in, and models are loaded in.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device a name such as ``cpu`` or ``cuda:1`` stands for.

    ``auto`` is the GPU, or the CPU where there is none; it and ``cuda`` are the GPU whose number is ``LOCAL_RANK`` (set
    by torchrun), without torchrun the current one. A GPU becomes the current device of the process, so that everything
    that names none (streams, events, kernels of other libraries) uses it too. Raises UserError for a device that this
    machine lacks, or that saelab does not run on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = existing_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def existing_device(name: str | torch.device) -> torch.device:
    """The device of that name, refused as :func:`pick_device` does; the current device of the process stays."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _not_here(name, f"{str(name)!r} is not the name of a device") from error
    if device.type not in KINDS:
        raise _not_here(name, f"saelab runs on {', '.join(KINDS)}")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise _not_here(name, "this is no Mac with a GPU, or PyTorch was built without it")
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")
        here = torch.cuda.current_device() if rank is None else int(rank) % torch.cuda.device_count()
        device = torch.device("cuda", here)
    try:
        torch.zeros(1, device=device).item()  # a device that is not there refuses
    except (RuntimeError, AssertionError) as error:
        raise _not_here(name, first_line(error).split(". ")[0]) from error  # PyTorch then explains its backends
    return device


def _not_here(name: str | torch.device, why: str) -> UserError:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["auto", "cpu", *(f"cuda:{i}" for i in range(count))]
    if torch.backends.mps.is_available():
        here.append("mps")
    return UserError(f"device {str(name)!r} is not available here ({why}); choose {', '.join(here)}")


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (Apple's ``mps``)."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_float64(x: Tensor) -> Tensor:
    """``x`` in float64, on its own device or, if that has no float64, on the CPU."""
    return (x if widest_float(x.device) == torch.float64 else x.cpu()).double()

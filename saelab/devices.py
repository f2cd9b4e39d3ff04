"""Names of devices, such as ``cuda:1`` or ``auto``."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from saelab.errors import UserError, first_line


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device a name such as ``cpu`` or ``cuda:1`` stands for.

    ``auto`` is the GPU whose number is ``LOCAL_RANK`` (set by torchrun; 0 without it), or the CPU where there is no
    GPU. Raises UserError for a device that this machine lacks.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without storage refuses
    except (RuntimeError, AssertionError) as error:
        why = first_line(error).split(". ")[0]  # PyTorch then lists every backend it was built with
        raise UserError(f"device {str(name)!r} is not available here ({why}); use cpu") from error
    return device


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (Apple's ``mps``)."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_float64(x: Tensor) -> Tensor:
    """``x`` in float64, on its own device or, if that has no float64, on the CPU."""
    return (x if widest_float(x.device) == torch.float64 else x.cpu()).double()

"""The device that a ``--device`` option names."""

from __future__ import annotations

import os

import torch

from saelab.errors import UserError, first_line

CPU = torch.device("cpu")


def pick_device(name: str) -> torch.device:
    """The device a name stands for; ``auto`` is the GPU of this process' number on its machine, or the CPU."""
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without storage refuses
    except (RuntimeError, AssertionError) as error:
        why = first_line(error).split(". ")[0]  # PyTorch goes on to list every backend it was built with
        raise UserError(f"device {name!r} is not available here ({why}); use cpu") from error
    return device

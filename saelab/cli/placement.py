"""Where a command computes: the device of ``--device``, refused if the kernels that were asked for cannot run there."""

from __future__ import annotations

import torch

from saelab.cli.console import console
from saelab.devices import pick_device
from saelab.errors import UserError
from saelab.kernels import compiling, dispatch


def computing_device(name: str) -> torch.device:
    """:func:`saelab.devices.pick_device`; UserError too where the kernel backend that was named cannot run there."""
    device = pick_device(name)
    if console.is_interactive:
        compiling.tell_before(lambda: console.print("compiling kernels (once, about 20 s)"))
    reason = dispatch.refusal(device.type)
    if reason:
        raise UserError(f"{dispatch.VARIABLE}: {reason}; unset it, or choose another device")
    return device

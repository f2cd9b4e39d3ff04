"""Where a command computes: the device of ``--device``, and the processes of torchrun that divide a model."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from saelab.cli.console import console, quiet
from saelab.devices import pick_device
from saelab.distributed import launched, start_world
from saelab.distributed.exchange import exchange_bytes
from saelab.distributed.world import end_world
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


def join(tensor_parallel: bool, device: torch.device) -> None:
    """Join the processes that torchrun started, for a model that is divided over them.

    All of them then run the same command; those for which :func:`follows` is true print and write nothing. UserError
    under torchrun without ``--tensor-parallel``: each process would do the same work and write the same files.
    """
    if not launched():
        return
    if not tensor_parallel:
        raise UserError("this command runs in one process; start it without torchrun, or add --tensor-parallel")
    start_world(device=device, timeout_s=3600.0)
    atexit.register(end_world)
    quiet(follows())


def follows() -> bool:
    """Whether another process prints and writes what this one computes too."""
    return dist.is_initialized() and dist.get_rank() > 0


def of_the_first(flag: bool) -> bool:
    """The ``flag`` of the process that prints and writes, where several divide a model; else the one given."""
    return exchange_bytes(b"1" if flag else b"")[0] == b"1" if dist.is_initialized() else flag


def scratch_folder() -> Path:
    """A folder for what a process that follows would write, removed when it ends."""
    folder = tempfile.mkdtemp(prefix="saelab-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)

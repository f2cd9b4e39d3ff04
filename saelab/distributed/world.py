"""The processes of a run as a mesh of data ranks times dictionary ranks, and their collective operations.

A *data rank* takes its share of every batch; a *dictionary rank* holds its share of the latents and sees all tokens
of its data rank. The gradient of a parameter is summed over the data ranks; losses are normalised by the whole
batch, so that sums over ranks are what a single process computes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from saelab.distributed.failures import launched, meet
from saelab.errors import UserError

__all__ = ["SINGLE", "Parallel", "Poll", "end_world", "launched", "start_world"]


@dataclass(frozen=True)
class Parallel:
    """This process's place in the mesh. The default is a single process, for which every method is the identity."""

    data_size: int = 1
    data_rank: int = 0
    dict_size: int = 1
    dict_rank: int = 0
    data_group: Any = None
    dict_group: Any = None
    patient_group: Any = None  # of all processes, on the CPU, for what may take long: checkpoints, checksums
    mesh: DeviceMesh | None = None  # data x dict, on the device
    host_mesh: DeviceMesh | None = None  # dict x data, on the CPU: a rank's place in the tensors of a checkpoint
    traffic: Counter[str] = field(default_factory=Counter)  # bytes this process sends in a ring, by purpose

    @property
    def is_main(self) -> bool:
        """Whether this process prints and logs."""
        return self.data_rank == 0 and self.dict_rank == 0

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.data_size * self.dict_size

    def latents(self, d_sae: int) -> slice:
        """The latents of the whole dictionary that this rank holds."""
        part = d_sae // self.dict_size
        return slice(self.dict_rank * part, (self.dict_rank + 1) * part)

    def sum_data(self, tensor: Tensor, purpose: str) -> Tensor:
        """Add up over the data ranks, in place."""
        return self._all_reduce(tensor, self.data_group, self.data_size, purpose)

    def any_data(self, flags: Tensor) -> Tensor:
        """Which flags are set on any data rank."""
        if self.data_size == 1:
            return flags
        return self._all_reduce(flags.byte(), self.data_group, self.data_size, "statistics", dist.ReduceOp.MAX).bool()

    def least_data(self, tensor: Tensor, purpose: str) -> Tensor:
        """The elementwise minimum over the data ranks, in place."""
        return self._all_reduce(tensor, self.data_group, self.data_size, purpose, dist.ReduceOp.MIN)

    def sum_dict(self, tensor: Tensor, purpose: str) -> Tensor:
        """Add up over the dictionary ranks, in place."""
        return self._all_reduce(tensor, self.dict_group, self.dict_size, purpose)

    def sum_all(self, tensor: Tensor, purpose: str) -> Tensor:
        """Add up over all processes, in place."""
        return self._all_reduce(tensor, dist.group.WORLD, self.size, purpose)

    def gather_dict(self, tensor: Tensor, purpose: str) -> Tensor:
        """The tensors of all dictionary ranks, stacked. ``[dict_size, ...]``"""
        if self.dict_size == 1:
            return tensor[None]
        parts = tensor.new_empty(self.dict_size, *tensor.shape)
        dist.all_gather(list(parts.unbind(0)), tensor.contiguous(), group=self.dict_group)
        self.traffic[purpose] += (self.dict_size - 1) * _bytes(tensor)
        return parts

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return (self.size > 1 and bool(self.sum_all(torch.tensor([float(flag)]), "control"))) or flag

    def barrier(self) -> None:
        """Wait for all processes, as long as a checkpoint may take."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self.patient_group)

    def check_equal(self, what: str, text: str, remedy: str) -> None:
        """Raise UserError, the same on all processes, where ``text`` is not equal on all; ``what`` names it."""
        if self.size == 1:
            return
        own = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.patient_group)
        other = [rank for rank, digest in enumerate(found) if not torch.equal(digest, found[0])]
        if other:
            raise UserError(f"{what} differs between process 0 and process {', '.join(map(str, other))}; {remedy}")

    def _all_reduce(self, tensor: Tensor, group: Any, size: int, purpose: str, op: Any = None) -> Tensor:
        if size == 1:
            return tensor
        # A column-major matrix is its contiguous transpose.
        plain = tensor if tensor.is_contiguous() else tensor.T
        dist.all_reduce(plain, dist.ReduceOp.SUM if op is None else op, group=group)
        self.traffic[purpose] += 2 * (size - 1) * _bytes(tensor) // size
        return tensor


SINGLE = Parallel()


class Poll:
    """Ask all processes about once a second whether something has happened, after steps on which they agree."""

    def __init__(self, parallel: Parallel, seconds: float = 1.0) -> None:
        self.parallel, self.seconds = parallel, seconds
        self._every = self._left = 1
        self._last = time.monotonic()

    def __call__(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process; each calls this after every step and is told at the same one."""
        if self.parallel.size == 1:
            return flag
        self._left -= 1
        if self._left > 0:
            return False
        now = time.monotonic()
        # Whole numbers, so that the sums are the same on all processes.
        told = torch.tensor([int(flag), int(1e6 * (now - self._last))])
        set_on, spent = self.parallel.sum_all(told, "control").tolist()
        fits = self.seconds * self._every * self.parallel.size / max(spent / 1e6, 1e-6)
        self._every = self._left = max(1, min(1000, 2 * self._every, round(fits)))
        self._last = now
        return set_on > 0


def start_world(
    dict_ranks: int = 1,
    device: torch.device | str = "cpu",
    timeout_s: float = 60.0,
    checkpoint_timeout_s: float = 3600.0,
) -> Parallel:
    """Join the processes that torchrun started, ``dict_ranks`` of which share each copy of the dictionary.

    A collective that waits longer than ``timeout_s`` for another process raises, so that a rank that hangs ends the
    run with the name of the operation instead of blocking it; one that dies is noticed at once. While a checkpoint is
    written or a cache is checked, processes wait for ``checkpoint_timeout_s``.
    """
    device = torch.device(device)
    if device.type == "mps":
        raise UserError("several processes train on cpu or cuda, not on mps; start one process, without torchrun")
    world = int(os.environ["WORLD_SIZE"])
    if dict_ranks < 1 or world % dict_ranks:
        raise UserError(f"dict_ranks={dict_ranks} does not divide the {world} processes; choose a divisor")
    if device.type == "cuda":
        torch.cuda.set_device(_card(device))
    # Tensors that steer the run live on the CPU even where the weights do not.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **meet(timeout_s))
    mesh = init_device_mesh(device.type, (world // dict_ranks, dict_ranks), mesh_dim_names=("data", "dict"))
    ranks = torch.arange(world).view(world // dict_ranks, dict_ranks)
    return Parallel(
        data_size=world // dict_ranks,
        data_rank=mesh.get_local_rank("data"),
        dict_size=dict_ranks,
        dict_rank=mesh.get_local_rank("dict"),
        data_group=mesh.get_group("data"),
        dict_group=mesh.get_group("dict"),
        patient_group=dist.new_group(backend="gloo", timeout=timedelta(seconds=checkpoint_timeout_s)),
        mesh=mesh,
        host_mesh=DeviceMesh("cpu", ranks.T.contiguous(), mesh_dim_names=("dict", "data")),
    )


def _card(device: torch.device) -> torch.device:
    """The GPU of this process, of the number that torchrun gave it. UserError where two processes would share one."""
    here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if here > cards:
        raise UserError(f"{here} processes here, and GPUs for {cards}; start one process for each GPU")
    if here > 1 and device.index not in (None, own):
        raise UserError(f"device={device} is one GPU for {here} processes; use cuda, which gives each its own")
    return device if device.index is not None else torch.device("cuda", own)


def end_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""The processes of a run as a mesh of data ranks times dictionary ranks, and their collective operations.

A *data rank* takes its share of every batch; a *dictionary rank* holds its share of the latents and sees all tokens
of its data rank. The gradient of a parameter is summed over the data ranks; losses are normalised by the whole
batch, so that sums over ranks are what a single process computes.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from saelab.errors import UserError


@dataclass(frozen=True)
class Parallel:
    """This process's place in the mesh. The default is a single process, for which every method is the identity."""

    data_size: int = 1
    data_rank: int = 0
    dict_size: int = 1
    dict_rank: int = 0
    data_group: Any = None
    dict_group: Any = None
    traffic: Counter[str] = field(default_factory=Counter)  # bytes this process sends in a ring, by purpose

    @property
    def is_main(self) -> bool:
        """Whether this process prints and logs."""
        return self.data_rank == 0 and self.dict_rank == 0

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.data_size * self.dict_size

    def share(self, rows: Tensor) -> Tensor:
        """This data rank's part of a batch."""
        if self.data_size == 1:
            return rows
        part = rows.shape[0] // self.data_size
        return rows[self.data_rank * part : (self.data_rank + 1) * part]

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

    def sum_dict(self, tensor: Tensor, purpose: str) -> Tensor:
        """Add up over the dictionary ranks, in place."""
        return self._all_reduce(tensor, self.dict_group, self.dict_size, purpose)

    def sum_all(self, tensor: Tensor, purpose: str) -> Tensor:
        """Add up over all processes, in place."""
        return self.sum_data(self.sum_dict(tensor, purpose), purpose)

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
        """Wait for all processes."""
        self.any(False)

    def _all_reduce(self, tensor: Tensor, group: Any, size: int, purpose: str, op: Any = None) -> Tensor:
        if size == 1:
            return tensor
        # A column-major matrix is its contiguous transpose.
        plain = tensor if tensor.is_contiguous() else tensor.T
        dist.all_reduce(plain, dist.ReduceOp.SUM if op is None else op, group=group)
        self.traffic[purpose] += 2 * (size - 1) * _bytes(tensor) // size
        return tensor


SINGLE = Parallel()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_world(dict_ranks: int = 1, device: torch.device | str = "cpu", timeout_s: float = 60.0) -> Parallel:
    """Join the processes that torchrun started, ``dict_ranks`` of which share each copy of the dictionary.

    A collective that waits longer than ``timeout_s`` for another process raises, so that a rank that hangs ends the
    run with the name of the operation instead of blocking it; one that dies is noticed at once.
    """
    device = torch.device(device)
    if device.type == "mps":
        raise UserError("several processes train on cpu or cuda, not on mps; start one process, without torchrun")
    world = int(os.environ["WORLD_SIZE"])
    if dict_ranks < 1 or world % dict_ranks:
        raise UserError(f"dict_ranks={dict_ranks} does not divide the {world} processes; choose a divisor")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Tensors that steer the run live on the CPU even where the weights do not.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    mesh = init_device_mesh(device.type, (world // dict_ranks, dict_ranks), mesh_dim_names=("data", "dict"))
    return Parallel(
        data_size=world // dict_ranks,
        data_rank=mesh.get_local_rank("data"),
        dict_size=dict_ranks,
        dict_rank=mesh.get_local_rank("dict"),
        data_group=mesh.get_group("data"),
        dict_group=mesh.get_group("dict"),
    )


def end_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

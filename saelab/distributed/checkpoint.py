"""Tensors that many processes hold in parts, on disk: ``torch.distributed.checkpoint`` with safetensors files.

Each process writes what it holds into a file of its own, and tensors that several hold alike are written once. Any
number of processes can read them again, each its own parts, whatever number wrote them; a safetensors file of one
process is read in the same way. Nothing is pickled.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.distributed.world import Parallel
from saelab.errors import UserError, first_line
from saelab.files import write_tensors
from saelab.sae.parts import check_complete, owner, read_parts

ONE_FILE = "model-00001-of-00001.safetensors"  # as the writer calls the file that it makes of the parts


def split_dims(shard: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, int]:
    """Along which dimension each tensor of ``shard`` is a slice of that of ``whole``, by name.

    Tensors of equal shape are held in full by every rank and are left out. Only the shapes of ``whole`` are read.
    """
    shapes = {name: (part.shape, whole[name].shape) for name, part in shard.items()}
    return {
        name: dim
        for name, (part, full) in shapes.items()
        for dim, (size, full_size) in enumerate(zip(part, full, strict=True))
        if size != full_size
    }


def slices(tensors: Mapping[str, Tensor], dims: Mapping[str, int], parallel: Parallel) -> dict[str, Tensor]:
    """This dictionary rank's slices of whole tensors."""
    parts = {}
    for name, tensor in tensors.items():
        dim = dims.get(name)
        parts[name] = tensor if dim is None else tensor[(slice(None),) * dim + (parallel.latents(tensor.shape[dim]),)]
    return parts


@dataclass(frozen=True)
class Layout:
    """How the tensors of a run lie on its processes, by the names of :func:`saelab.sae.parts.owner`."""

    shapes: Mapping[str, torch.Size]  # of the whole tensors
    parallel: Parallel
    by_dict: Mapping[str, int] = field(default_factory=dict)  # the dimension that is divided over dictionary ranks
    by_data: Mapping[str, int] = field(default_factory=dict)  # and the one that is divided further over data ranks

    def place(self, name: str, local: Tensor) -> Tensor:
        """``local``, contiguous and on the CPU, as a part of the whole tensor; the tensor itself in one process."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = self.parallel.host_mesh
        if mesh is None:
            return local
        shape = self.shapes[owner(name)]
        if local.ndim != len(shape):  # a count of the optimizer's steps
            return DTensor.from_local(local, mesh, [Replicate(), Replicate()], run_check=False)
        dims = (self.by_dict.get(owner(name)), self.by_data.get(owner(name)))
        placed = [Replicate() if dim is None else Shard(dim) for dim in dims]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placed, run_check=False, shape=shape, stride=stride)


def write(tensors: Mapping[str, Tensor], folder: Path, parallel: Parallel, one_file: bool = False) -> None:
    """Write the placed tensors of all processes into a folder, which must be one for all; every process calls it.

    With ``one_file`` the parts are also joined there, in the file ``ONE_FILE``.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.api import CheckpointException

    to = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=one_file)
    try:
        dcp.save(dict(tensors), storage_writer=to, process_group=parallel.patient_group)
    except CheckpointException as error:
        raise _cause(error) from error
    if parallel.is_main:
        check_complete(folder / "sharded" if one_file else folder)


def export(tensors: Mapping[str, Tensor], path: Path, parallel: Parallel) -> None:
    """Write the placed tensors of all processes into one safetensors file; every process calls it.

    They are joined on disk and held by no process, unless there are numbers besides floating-point ones among them.
    """
    folder = path.with_name(f".{path.name}.parts")
    if parallel.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    parallel.barrier()
    # The writer joins floating-point numbers only, and loses the value of a tensor without dimensions.
    joins = all(t.ndim and t.is_floating_point() for t in tensors.values())
    write(tensors, folder, parallel, one_file=joins)
    if parallel.is_main:
        if joins:
            (folder / ONE_FILE).replace(path)
        else:
            write_tensors(path, read_parts(folder, {name: t.shape for name, t in tensors.items()}.get))
        shutil.rmtree(folder)


def _cause(error: Any) -> Exception:
    """What went wrong first, in the process of the lowest number."""
    failures: Iterable[Any] = error.failures.values()
    for failure in failures:
        cause = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(cause, UserError | OSError):
            return cause
    return RuntimeError(f"the checkpoint was not written: {first_line(error)}")

"""Tensors that several processes hold in slices, written into and read from one ordinary safetensors file.

The file is the one that a single process would write, so a run can continue with any number of dictionary ranks: each
reads its own slice. Nothing is gathered: every rank writes its slice in place (ranks share a file system).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from saelab.distributed.world import Parallel
from saelab.files import sync

NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
NAMES[torch.bfloat16] = "BF16"


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


def split_dim(name: str, ndim: int, dims: Mapping[str, int]) -> int | None:
    """The split dimension of a tensor of an SAE or its training state (``optimizer.W_dec.exp_avg``, say)."""
    if name == "tokens_since_fired":
        return 0 if dims else None
    if name.startswith("optimizer."):
        name = name.removeprefix("optimizer.").rpartition(".")[0]
    dim = dims.get(name.removeprefix("ema."), ndim)
    return dim if dim < ndim else None


def write_sharded(path: Path, tensors: Mapping[str, Tensor], dims: Mapping[str, int], parallel: Parallel) -> None:
    """Write the tensors of all dictionary ranks into one file; every process calls it.

    ``dims`` is what :func:`split_dims` gives. The file appears under its name when it is complete.
    """
    partial = path.with_name(f".{path.name}.partial")  # all ranks know this name
    shapes = {name: _whole_shape(name, tensor, dims, parallel) for name, tensor in tensors.items()}
    header, start = _header(tensors, shapes)
    if parallel.is_main:
        with partial.open("wb") as file:
            file.write(header)
            file.truncate(start["end"])
    parallel.barrier()
    if parallel.data_rank == 0:
        for name, tensor in tensors.items():
            dim = split_dim(name, tensor.ndim, dims)
            if (dim is None and parallel.dict_rank) or not tensor.numel():
                continue
            # numpy has no bfloat16: its bits are written.
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            values = bits.detach().cpu().numpy()
            whole = np.memmap(partial, values.dtype, "r+", start[name], tuple(shapes[name]) or (1,))
            if dim is None:
                whole[...] = values
            else:
                part = tensor.shape[dim] * parallel.dict_rank
                whole[(slice(None),) * dim + (slice(part, part + tensor.shape[dim]),)] = values
            whole.flush()
    parallel.barrier()
    if parallel.is_main:
        sync(partial)
        partial.replace(path)
    parallel.barrier()


def read_slices(path: Path, dims: Mapping[str, int], parallel: Parallel) -> dict[str, Tensor]:
    """This dictionary rank's slices of the tensors in a file, whatever number of ranks wrote it."""
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            view = file.get_slice(name)
            shape = view.get_shape()
            dim = split_dim(name, len(shape), dims)
            if dim is None:
                tensors[name] = file.get_tensor(name)
            else:
                tensors[name] = view[(slice(None),) * dim + (parallel.latents(shape[dim]),)].contiguous()
    return tensors


def slices(tensors: Mapping[str, Tensor], dims: Mapping[str, int], parallel: Parallel) -> dict[str, Tensor]:
    """This dictionary rank's slices of whole tensors, the same that :func:`read_slices` takes from a file."""
    parts = {}
    for name, tensor in tensors.items():
        dim = split_dim(name, tensor.ndim, dims)
        parts[name] = tensor if dim is None else tensor[(slice(None),) * dim + (parallel.latents(tensor.shape[dim]),)]
    return parts


def _whole_shape(name: str, tensor: Tensor, dims: Mapping[str, int], parallel: Parallel) -> list[int]:
    dim = split_dim(name, tensor.ndim, dims)
    return [size * parallel.dict_size if i == dim else size for i, size in enumerate(tensor.shape)]


def _header(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, and where in the file each tensor starts."""
    entries, at = {}, 0
    # The format wants no gaps; by falling item size, every tensor is aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        size = math.prod(shapes[name]) * tensors[name].element_size()
        entries[name] = {"dtype": NAMES[tensors[name].dtype], "shape": shapes[name], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    starts = {name: base + entry["data_offsets"][0] for name, entry in entries.items()}
    return struct.pack("<Q", len(text)) + text, {**starts, "end": base + at}

"""Tensors in several safetensors files of a folder, as the processes of a distributed run write them.

Each file holds parts of tensors, and says which (``torch.distributed.checkpoint`` with its safetensors storage). A
plain safetensors file is read in the same way, as one part. Nothing is unpickled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import UserError

FILES = "shard-*.safetensors"  # as torch.distributed.checkpoint calls them


def owner(name: str) -> str:
    """The tensor of the SAE that one of the training state belongs to (``W_dec`` for ``optimizer.W_dec.exp_avg``)."""
    if name.startswith("optimizer."):
        return name.removeprefix("optimizer.").rpartition(".")[0]
    return name.removeprefix("ema.")


def in_parts(folder: Path | str) -> bool:
    """Whether a folder holds the weights in parts."""
    return any(Path(folder).glob(FILES))


def read_parts(
    folder: Path | str,
    shape_of: Callable[[str], torch.Size | None],
    place: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors for which ``shape_of`` gives the shape that the caller holds, on the CPU.

    ``place`` says which part of the whole tensor that is (a DTensor).
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    tensors: dict[str, Tensor] = {}
    for name, about in check_complete(folder).items():
        own = shape_of(name)
        if own is not None:
            # A count of the optimizer's steps has no dimensions.
            size = own if len(own) == len(about.size) else about.size
            tensors[name] = torch.empty(size, dtype=about.properties.dtype)
    placed = tensors if place is None else {name: place(name, tensor) for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read this, too
        dcp.load(dict(placed), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def check_complete(folder: Path | str) -> dict[str, Any]:
    """What the files of a folder hold, by name. UserError where a part of a tensor is in none of them."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, about in found.items():
        there = sum(math.prod(chunk.sizes) for chunk in about.chunks)
        if there != math.prod(about.size):
            raise UserError(
                f"{folder} lacks a part of {name}: {there} of {math.prod(about.size)} numbers are there; "
                "all processes need the same run folder, on a file system that they share"
            )
    return found

"""What one training step asks of a GPU, counted on the CPU: kernels, synchronisations and bytes per parameter.

The step runs as on a GPU, on Triton kernels under their interpreter. A dispatch mode sees every operation of PyTorch,
and the one function that launches our kernels reports to it. An operation is one kernel, though sorting takes several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saelab import kernels
from saelab.kernels import checks

# Operations that give a name to memory, or take some, and start nothing.
FREE = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "unbind", "split", "empty", "empty_like", "empty_strided", "new_empty", "unfold",
    "lift_fresh", "set_", "_reshape_alias", "diagonal", "resize_",
}  # fmt: skip
# Operations for whose result the host waits: its value, or the size that it has.
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
# What our kernels read and write of tensors as large as a weight matrix. Gathered rows are not a pass over a matrix.
PASSES = {
    "latents_kernel": {"dec": 1, "enc": 1, "W_dec": 1},
    "adam_kernel": {"weight": 2, "grad": 1, "first": 2, "second": 2},
}


@dataclass
class Count:
    """What was counted; ``bytes`` are of passes over tensors with as many elements as a weight matrix, or more."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def launches(self) -> int:
        return self.kernels.total()


class Counting(TorchDispatchMode):
    """Counts the operations of PyTorch inside the block. ``size`` is how many elements a weight matrix has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.count, self.size = Count(), size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in WAITS:
            self.count.waits[name] += 1
        if name not in FREE and name not in WAITS - {"nonzero", "bincount"}:
            self.count.kernels[name] += 1
            read = [t for t in _tensors((args, kwargs)) if t.numel() >= self.size]
            written = [t for t in _tensors(out) if t.numel() >= self.size]
            # The encoder's product reads its matrix, which is its work and no pass over parameters.
            if name not in ("mm", "addmm"):
                self.count.bytes[name] += sum(t.numel() * t.element_size() for t in [*read, *written])
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], operands: tuple[Any, ...], constants: Mapping) -> None:
        """Count a launch of ours."""
        if 0 in grid:
            return
        name, of = kernel.fn.__name__, dict(zip(kernel.arg_names, operands)) | dict(constants)
        self.count.kernels[name] += 1
        flags = {"dec": of.get("DEC"), "enc": of.get("ENC"), "W_dec": of.get("PROJECT")}
        for operand, passes in PASSES.get(name, {}).items():
            tensor = of[operand]
            if flags.get(operand, True) and tensor.numel() >= self.size:
                self.count.bytes[name] += passes * tensor.numel() * tensor.element_size()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


@contextmanager
def counting(size: int) -> Iterator[Count]:
    """Count inside the block, with the checks left out that are made on a CPU only."""
    from saelab.kernels.triton import backend, launch, ragged, residual

    mode, original, code = Counting(size), launch.launch, checks.code
    modules = [module for module in (backend, ragged, residual, _adam()) if hasattr(module, "launch")]

    def watched(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
        mode.launched(kernel, grid, operands, constants)
        with _unwatched():
            original(kernel, grid, *operands, **constants)

    try:
        for module in modules:
            module.launch = watched
        checks.code = lambda *_: None
        with kernels.use_backend("triton"), mode:
            yield mode.count
    finally:
        for module in modules:
            module.launch = original
        checks.code = code


def _adam() -> Any:
    from saelab.kernels.triton import adam

    return adam


def _unwatched() -> Any:
    return torch.utils._python_dispatch._disable_current_modes()

"""The entries of a ragged code in the order of their latents: what every gradient of the dictionary needs."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from saelab.kernels.precision import Precision, current, use_precision
from saelab.kernels.reference.backend import LatentGrads, Sorted


class ByLatent:
    """Sorts a code by latent on first use, and keeps the result for the other gradients of the same code."""

    def __init__(self, indices: Tensor, row_ptr: Tensor, d_sae: int) -> None:
        """``indices [nnz]`` and ``row_ptr [n + 1]`` are those of the code; they must not change afterwards."""
        self.indices, self.row_ptr, self.d_sae = indices, row_ptr, d_sae
        self.precision: Precision = current()  # gradients are taken on another thread
        self.sums: RowSums | None = None  # for gradient passes over this code to fill
        self._sorted: Sorted | None = None

    def sorted(self, ops: ModuleType) -> Sorted:
        """The order, made by the backend ``ops`` that takes the gradients."""
        if self._sorted is None:
            with use_precision(self.precision):
                self._sorted = ops.by_latent(self.indices, self.row_ptr, self.d_sae)
        assert self._sorted is not None
        return self._sorted


class RowSums:
    """What the gradient passes of a training step find out about each latent on their way; empty where none has run.

    ``scale [d_sae]`` is one over the norm of each dictionary row, and ``squares [d_sae]`` the squared norm of the
    gradients of encoder vector and dictionary row together, the part of the last along the row removed; of the
    encoder's bias, too, where one pass takes all three. ``errors [n]`` are the squared errors of the tokens. ``passes``
    says of each gradient that was measured where it lies and in which version.
    """

    def __init__(self) -> None:
        self.scale: Tensor | None = None
        self.squares: Tensor | None = None
        self.errors: Tensor | None = None
        self.passes: dict[str, tuple[int, int]] = {}

    def add(self, found: LatentGrads, **grads: Tensor | None) -> None:
        """Take over what a pass has measured of the gradients with these names."""
        if found.squares is None:
            return
        self.scale = self.scale if found.scale is None else found.scale
        self.squares = found.squares if self.squares is None else self.squares + found.squares
        self.passes |= {name: (grad.data_ptr(), grad._version) for name, grad in grads.items() if grad is not None}

    def holds(self, name: str, grad: Tensor | None) -> bool:
        """Whether ``grad`` is what was measured under this name: nothing else has been added to it."""
        return grad is not None and self.passes.get(name) == (grad.data_ptr(), grad._version)

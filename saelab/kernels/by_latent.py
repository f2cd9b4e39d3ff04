"""The entries of a ragged code in the order of their latents: what every gradient of the dictionary needs."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from saelab.kernels.precision import Precision, current, use_precision
from saelab.kernels.reference.backend import Sorted


class ByLatent:
    """Sorts a code by latent on first use, and keeps the result for the other gradients of the same code."""

    def __init__(self, indices: Tensor, row_ptr: Tensor, d_sae: int) -> None:
        """``indices [nnz]`` and ``row_ptr [n + 1]`` are those of the code; they must not change afterwards."""
        self.indices, self.row_ptr, self.d_sae = indices, row_ptr, d_sae
        self.precision: Precision = current()  # gradients are taken on another thread
        self._sorted: Sorted | None = None

    def sorted(self, ops: ModuleType) -> Sorted:
        """The order, made by the backend ``ops`` that takes the gradients."""
        if self._sorted is None:
            with use_precision(self.precision):
                self._sorted = ops.by_latent(self.indices, self.row_ptr, self.d_sae)
        assert self._sorted is not None
        return self._sorted


class RowSums:
    """What the gradient pass of a training step finds out about each latent on its way; empty where it has not run.

    ``scale [d_sae]`` is one over the norm of each dictionary row, and ``squares [d_sae]`` the squared norm of the
    gradients of encoder vector, encoder bias and dictionary row together, the part of the last along the row removed.
    ``errors [n]`` are the squared errors of the tokens.
    """

    def __init__(self) -> None:
        self.scale: Tensor | None = None
        self.squares: Tensor | None = None
        self.errors: Tensor | None = None

"""Where the rows of a ragged code begin: ``row_ptr [n + 1]`` of :class:`saelab.sparse.SparseCode`."""

from __future__ import annotations

import torch
from torch import Tensor


def pointers(counts: Tensor) -> Tensor:
    """``row_ptr [n + 1]`` of the numbers of entries per row."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def row_pointers(rows: Tensor, n: int) -> Tensor:
    """``row_ptr [n + 1]`` of ascending row numbers."""
    return torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))


def row_ids(row_ptr: Tensor, nnz: int) -> Tensor:
    """The row each entry of a ragged code belongs to, ``[nnz]``."""
    return torch.repeat_interleave(row_ptr.diff(), output_size=nnz)

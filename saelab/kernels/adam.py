"""Adam on column-major matrices at the speed of row-major ones.

PyTorch's fused Adam copies what is not contiguous: measured on 16384 x 576 parameters, 139 ms a step against 24. The
update acts on single entries, so the transposed matrix, whose memory is contiguous, can be passed instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` with the same results to the bit, and state in the parameter's own shape and layout."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:  # pyright: ignore
        """Collect a group's tensors as the parent does; hand over transposed those that are column-major throughout.

        If a release of PyTorch stops calling this method, updates stay correct and become slow.
        """
        has_complex = super()._init_group(group, *lists)
        for i in range(len(lists[0])):
            matrices = [tensors for tensors in lists if i < len(tensors) and tensors[i].dim() == 2]
            if matrices and all(_column_major(tensors[i]) for tensors in matrices):
                for tensors in matrices:
                    tensors[i] = tensors[i].T
        return has_complex


def _column_major(matrix: Tensor) -> bool:
    return matrix.T.is_contiguous() and not matrix.is_contiguous()

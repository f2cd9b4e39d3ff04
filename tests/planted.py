"""Shared by the tests of training and sweeps: activations with structure to learn, a small grid, folder contents.

``activations`` draws from its own generator, so its rows do not depend on the seed of a test.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

# A grid file: a budget per token and one per batch, each at two learning rates; halving stops the worse one.
GRID = """
[train]
epochs = 6
batch_size = 64
[[grid]]
variant = ["topk", "batch_topk"]
d_sae = 20
k = 2
lr = [1e-2, 1e-3]
[halving]
at = [0.4]
"""


def activations(n: int, d_in: int) -> Tensor:
    """Sparse sums of 16 directions, away from the origin. ``[n, d_in]``"""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(n, 16, generator=generator) * (torch.rand(n, 16, generator=generator) < 0.2)
    return 5 * codes @ torch.randn(16, d_in, generator=generator) + 3


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below ``folder`` by its path there: equal dictionaries are identical folders."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

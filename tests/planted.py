"""What the tests of training share: a cache with something to learn, a grid of SAEs, and the files that come of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

# Two variants that differ in how they spend a budget, and learning rates of which halving stops the worse.
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
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

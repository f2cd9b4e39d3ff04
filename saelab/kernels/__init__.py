"""Operations on plain tensors, and the choice of the backend that runs them."""

from __future__ import annotations

from saelab.kernels.adam import Adam
from saelab.kernels.by_latent import ByLatent, RowSums
from saelab.kernels.dispatch import backend, describe, use_backend
from saelab.kernels.ops import (
    SelectedPreActs,
    decode,
    gather_rows,
    pre_acts_at,
    pursuit,
    reconstruct,
    select_batch,
    select_gradient_topk,
    select_latent,
    select_threshold,
    select_topk,
    sse,
)
from saelab.kernels.precision import Precision, arithmetic, default_precision, use_precision
from saelab.kernels.subset import explain, rectified

__all__ = [
    "Adam",
    "ByLatent",
    "Precision",
    "RowSums",
    "SelectedPreActs",
    "arithmetic",
    "backend",
    "decode",
    "default_precision",
    "describe",
    "explain",
    "gather_rows",
    "pre_acts_at",
    "pursuit",
    "reconstruct",
    "rectified",
    "select_batch",
    "select_gradient_topk",
    "select_latent",
    "select_threshold",
    "select_topk",
    "sse",
    "use_backend",
    "use_precision",
]

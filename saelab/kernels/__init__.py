"""Ops on raw tensors, with one place that picks the backend."""

from __future__ import annotations

from saelab.kernels.ops import (
    SelectedPreActs,
    decode,
    pre_acts_at,
    select_batch,
    select_latent,
    select_threshold,
    select_topk,
)

__all__ = [
    "SelectedPreActs",
    "decode",
    "pre_acts_at",
    "select_batch",
    "select_latent",
    "select_threshold",
    "select_topk",
]

"""The backends a test runs on here, the dtype each computes in, and what rounding may do to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saelab import kernels
from saelab.kernels.cases import Case
from saelab.kernels.dispatch import obstacle

DTYPE = {"reference": torch.float64}
BACKENDS = [
    name for name in ("reference", "numba", "triton") if obstacle(name, "cpu", DTYPE.get(name, torch.float32)) is None
]


@contextmanager
def backend_and_dtype(name: str) -> Iterator[torch.dtype]:
    with kernels.use_backend(name):
        yield DTYPE.get(name, torch.float32)


def roundoff(case: Case) -> float:
    """One rounding error for each term of the longest sum: d_in products, then at most n or k of their results."""
    terms = case.x.shape[1] + max(case.k, case.x.shape[0])
    return terms * torch.finfo(case.x.dtype).eps


def gap(case: Case, score: Tensor) -> float:
    """Scores that rounding can swap: the error of a sum of d_in products, relative to the largest of them."""
    finite = score[score.isfinite()]
    return roundoff(case) * float(finite.abs().max()) if finite.numel() else 0.0


def tolerance(case: Case, expected: Tensor) -> dict[str, float]:
    """For sums of products: the absolute error is relative to the tensor's largest entry, since terms cancel."""
    finite = expected.detach()[expected.detach().isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return {"rtol": 4 * roundoff(case), "atol": 4 * roundoff(case) * max(scale, 1.0)}

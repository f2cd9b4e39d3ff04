"""The places a test runs on here (a backend and a device), the dtype each computes in, and what rounding may do to it.

Where there is a GPU, the reference and Triton run on it. Elsewhere Triton runs under its interpreter, and both also run
on a pretended GPU, which refuses tensors of the CPU, so that they and the tests are right before they meet a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab import kernels
from saelab.kernels.cases import Case
from saelab.kernels.dispatch import obstacle
from tests.pretend_gpu import PretendGpu

DTYPE = {"reference": torch.float64}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # of Triton, for tests that need no more than one


def places(gpu: bool) -> list[Any]:
    """``backend`` (on the CPU) and ``backend@device``, for all that run where there is a GPU, or none."""
    elsewhere = ("reference@cuda", "triton@cuda") if gpu else ("reference@pretended", "triton@pretended")
    names = ["reference", "numba", "triton", *elsewhere]
    found = []
    for name in names:
        backend, _, device = name.partition("@")
        kind = "cuda" if device == "cuda" else "cpu"
        if obstacle(backend, kind, DTYPE.get(backend, torch.float32)) is None:
            found.append(pytest.param(name, marks=pytest.mark.gpu) if kind == "cuda" else name)
    return found


BACKENDS = places(GPU)


@contextmanager
def backend_on(place: str) -> Iterator[tuple[str, torch.dtype]]:
    """Run a block on a place; yields the arguments of ``Tensor.to`` for what it shall read."""
    name, _, device = place.partition("@")
    with kernels.use_backend(name), PretendGpu() if device == "pretended" else nullcontext():
        yield "cuda" if device else "cpu", DTYPE.get(name, torch.float32)


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

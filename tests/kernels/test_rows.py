"""Reading stored rows: every 16-bit number widens to itself, and what is not finite is noticed."""

from __future__ import annotations

import pytest
import torch

from saelab import kernels
from saelab.kernels.dispatch import obstacle

BACKENDS = [name for name in ("reference", "numba") if obstacle(name) is None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_widens_to_itself(backend: str, dtype: torch.dtype) -> None:
    """Subnormals and negative zero included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    source = every[every.isfinite()].view(-1, 4)
    rows, out = torch.randperm(len(source)), torch.empty(len(source), 4)
    with kernels.use_backend(backend):
        assert kernels.gather_rows(source, rows, out)
    assert torch.equal(out.view(torch.int32), source[rows].float().view(torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_number_that_is_not_finite_is_noticed(backend: str, dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        source = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
        source[3, 6] = value
        with kernels.use_backend(backend):
            assert kernels.gather_rows(source, torch.tensor([0, 4, 2, 4]), torch.empty(4, 7))
            assert not kernels.gather_rows(source, torch.tensor([0, 3, 4]), torch.empty(3, 7))
            assert kernels.gather_rows(source, torch.empty(0, dtype=torch.int64), torch.empty(0, 7))


@pytest.mark.parametrize(
    ("source", "rows", "out", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), [0], (1, 2), "cannot gather torch.float64 rows"),
        (torch.zeros(3, 2), [0, 3], (2, 2), r"rows span 0..3, outside 0..2"),
        (torch.zeros(3, 2), [-1], (1, 2), "outside 0..2"),
        (torch.zeros(3, 2), [0], (2, 2), "do not fit"),
        (torch.zeros(2, 3).T, [0], (1, 2), "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(source: torch.Tensor, rows: list[int], out: tuple, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.gather_rows(source, torch.tensor(rows), torch.empty(out))

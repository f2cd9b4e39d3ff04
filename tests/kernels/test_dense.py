"""Codes that are not sparse take products of dense matrices on a GPU: the same numbers, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor

from saelab import kernels
from saelab.kernels import dense, products
from saelab.kernels.cases import CASES, Case, random_case
from saelab.kernels.dense import DenseOrSparse
from tests.kernels.backends import BACKENDS, backend_on, tolerance

NAMES = ["ordinary", "one-row", "one-latent", "popular", "no-bias", "row-major", "strided", "ties"]
FULL = "k-is-d_sae"  # small enough for all latents, and for none
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])
PLACES = [place for place in BACKENDS if "reference" not in str(getattr(place, "values", place))]


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where every code counts as dense, and a chunk holds a few tokens."""
    backend = import_module(f"saelab.kernels.{request.param.partition('@')[0]}.backend")
    monkeypatch.setattr(dense, "LEAST", 0)
    monkeypatch.setattr(backend.on_codes, "share", dict.fromkeys(backend.DENSE, -1.0))
    monkeypatch.setattr(products, "MIN_ROWS", 2)
    monkeypatch.setattr(dense, "CHUNK_BYTES", 1)
    with backend_on(request.param) as (device, _):
        yield device


def outcome(case: Case, threshold: float, twice: bool = False) -> list[Tensor | None]:
    """What a step of a threshold variant computes: loss, reconstruction, and all gradients."""
    tensors = [t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in case]
    mine = Case(*tensors)  # pyright: ignore
    with kernels.use_precision("fp32"):
        selected = kernels.select_threshold(*mine.encoder, threshold=threshold)
    values = kernels.pre_acts_at(*mine.encoder, selected)
    sse, recon = kernels.sse(mine.x, values, selected.indices, selected.row_ptr, mine.W_dec, mine.b_dec)
    loss = (sse * torch.linspace(0.5, 1.5, sse.numel()).to(sse)).sum() + 0.3 * values.sum()
    if twice:
        again = kernels.decode(values, selected.indices, selected.row_ptr, mine.W_dec, mine.b_dec)
        loss = loss + (again * recon).sum()
    loss.backward()
    return [sse.detach(), recon, *(t.grad for t in tensors if isinstance(t, Tensor))]


@pytest.mark.parametrize("name, threshold", [*((name, 0.3) for name in NAMES), (FULL, -10.0), (FULL, 100.0)])
@PRECISIONS
def test_dense_products_give_what_gathered_rows_give(
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: kernels.Precision,
    threshold: float,
) -> None:
    case = CASES[name]().to(device)
    with kernels.use_precision(precision):
        found = outcome(case, threshold, twice=True)
    monkeypatch.setattr(dense, "LEAST", 1 << 60)
    expected = outcome(case, threshold, twice=True)
    assert len(found) == len(expected) and len(found) >= 5
    for a, b in zip(found, expected):
        assert a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape
        close = tolerance(case, b)
        if precision == "bf16":  # two numbers of eight bits for each operand
            scale = 2.0**-14 * max(1.0, float(b.abs().max())) * case.W_dec.shape[0]
            close = {"rtol": 2.0**-13, "atol": scale}
        torch.testing.assert_close(a, b, **close)


@PRECISIONS
def test_dense_products_keep_the_layout_and_take_no_order(
    device: str, monkeypatch: pytest.MonkeyPatch, precision: kernels.Precision
) -> None:
    """Sorting the entries of such a code would cost more than the products; W_enc's gradient is column-major."""
    case = random_case(7, 12, 96, 8).to(device)
    ops = import_module(f"saelab.kernels.{kernels.backend(case.x)}.backend").on_codes
    monkeypatch.setattr(ops, "sparse", None)
    with kernels.use_precision(precision if kernels.backend(case.x) == "triton" else "fp32"):
        gradient = outcome(case, 0.1)[3]
    assert gradient is not None and gradient.stride() == case.W_enc.stride()


def test_what_is_dense_depends_on_the_share_of_active_latents() -> None:
    ops = DenseOrSparse(None, dense.fill, dense.pick, {True: 1 / 64, False: 1 / 16})
    row_ptr, indices = torch.arange(2**10 + 1) * 64, torch.zeros(2**16, dtype=torch.int64)  # 64 of each token's
    for d_sae, halves, expected in (
        (2**11, True, True),
        (2**11, False, False),
        (2**13, True, False),
        (2**10, True, True),
        (2**10, False, False),
        (2**10 - 1, True, False),  # too few entries in all to matter
    ):
        assert ops.pays(indices, row_ptr, d_sae, halves) == expected
    assert ops.pays(torch.zeros(2**18, dtype=torch.int64), row_ptr, 2**11, False)


def test_the_arithmetic_reaches_the_backward_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autograd runs it on a thread that knows nothing of the context."""
    used, original = [], dense.DenseOrSparse._sums
    record = lambda self, weights, by, data: used.append(by.halves) or original(self, weights, by, data)  # noqa: E731
    monkeypatch.setattr(dense.DenseOrSparse, "_sums", record)
    case = random_case(7, 12, 96, 8).to(device)
    has_halves = kernels.backend(case.x) == "triton"
    for precision, halves in (("fp32", False), ("bf16", has_halves)):
        used.clear()
        W_enc, W_dec = (t.clone().requires_grad_() for t in (case.W_enc, case.W_dec))
        selected = kernels.select_topk(case.x, W_enc, None, None, 8)
        with kernels.use_precision(precision):
            values = kernels.pre_acts_at(case.x, W_enc, None, None, selected)
            loss = kernels.sse(case.x, values, selected.indices, selected.row_ptr, W_dec, None)[0].sum()
        loss.backward()
        assert len(used) == 2 and set(used) == {halves}

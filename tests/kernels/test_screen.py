"""Selection by bfloat16 bounds: the bounds hold, the sets are those of float32, and what it cannot tell is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab import kernels
from saelab.kernels import cases, dispatch, products
from saelab.kernels.dispatch import obstacle
from tests.kernels import oracle, test_parity
from tests.kernels.backends import gap

if obstacle("numba", "cpu", torch.float32) is not None:
    pytest.skip("numba is not installed here", allow_module_level=True)

from saelab.kernels.numba import backend
from saelab.kernels.numba import bounds as numba_bounds
from saelab.kernels.numba import screen as numba_screen

SIGNS = pytest.mark.parametrize("signed", [False, True], ids=["relu", "signed"])


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screen whatever the size, and on CPUs that would be slow at it."""
    monkeypatch.setattr(numba_screen, "pays", lambda *sizes: True)


def screen_of(case: cases.Case, signed: bool) -> numba_screen.Screen:
    bias = backend._bias(case.b_enc, case.W_enc.shape[1])
    return numba_screen.Screen(case.x, case.W_enc, bias, case.b_dec, signed)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", cases.CASES)
@SIGNS
def test_the_cases_that_break_kernels(name: str, signed: bool) -> None:
    test_parity.test_topk_then_loss_matches_dense_autograd("numba", name, signed)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", cases.CASES)
@SIGNS
def test_the_cases_that_break_kernels_with_a_batch_budget(name: str, signed: bool) -> None:
    case = cases.CASES[name]()
    for budget in (1, case.k * case.x.shape[0]):
        selected = kernels.select_batch(*case.encoder, budget=budget, signed=signed)
        z = oracle.pre_acts(*case.to(torch.float64).encoder)
        score = oracle.key(z, signed)
        found = oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1])
        found, score = found.reshape(1, -1), score.reshape(1, -1)
        oracle.check_selection(found, oracle.topk_mask(score, budget), score, gap(case, score))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("d_in", [3, 64, 577])
def test_the_bounds_hold(d_in: int, scale: float) -> None:
    """Against float64, on numbers of very different sizes, whatever order the product is summed in."""
    generator = torch.Generator().manual_seed(d_in)
    x, W = (torch.randn(m, d_in, generator=generator) ** 5 for m in (40, 300))
    case = cases.Case(scale * x, W.T, torch.randn(300, generator=generator), None, W, 4)
    screen = screen_of(case, signed=False)
    bias = screen.bias.astype(np.float64)
    exact = (case.x.double() @ case.W_enc.double()).numpy() + bias
    for first, z, known in screen.chunks():
        high, best = np.empty(300, np.float32), np.empty(300, np.float32)
        for r in range(z.shape[0]):
            numba_bounds.bounds(z[r], screen.reach[first + r], *known[3:], high, best)
            assert (high >= exact[first + r]).all() and (best <= exact[first + r]).all()
            if screen.reach[first + r] < np.inf:  # and are no wider than the worst rounding of both factors
                about = exact[first + r] - bias
                norms = np.linalg.norm(case.x[first + r]) * np.linalg.norm(case.W_enc, axis=0)
                allowed = 2 * 2**-7 * (norms + np.abs(about)) + 2e-6 * np.abs(bias)
                assert (high - best <= 1.05 * allowed).all()


@SIGNS
def test_large_selections_are_exact_and_leave_no_row(signed: bool) -> None:
    case = cases.random_case(300, 96, 2048, 16)
    z = oracle.pre_acts(*case.to(torch.float64).encoder)
    score = oracle.key(z, signed)
    values, columns, left = numba_screen.topk(screen_of(case, signed), case.k)
    assert not left.numel()
    found = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, columns, True)
    expected = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, score.topk(case.k).indices, True)
    oracle.check_selection(found, expected, score, gap(case, score))
    torch.testing.assert_close(values.double(), z.gather(1, columns), atol=gap(case, score), rtol=0)
    keys, batch_values, places = found_in_batch(case, signed)
    assert set(places.tolist()) == set(score.flatten().topk(300 * case.k).indices.tolist())
    np.testing.assert_array_equal(keys, np.abs(batch_values) if signed else batch_values)


def found_in_batch(case: cases.Case, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = numba_screen.batch(screen_of(case, signed), case.x.shape[0] * case.k)
    assert found is not None
    return found


def test_rows_it_cannot_tell_are_left_and_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.random_case(130, 32, 2048, 8)
    x = case.x.clone()
    x[3], x[7], x[11] = torch.nan, torch.inf, case.b_dec  # not a number, infinite, nothing but the bias
    x[19, 5], x[20] = 3e38, 1e-30
    case = case._replace(x=x)
    _, _, left = numba_screen.topk(screen_of(case, False), case.k)
    assert {3, 7, 11, 19} <= set(left.tolist()) and left.numel() < 8
    monkeypatch.setattr(numba_screen, "pays", lambda *sizes: False)
    plain = kernels.select_topk(*case.encoder, k=case.k)
    monkeypatch.setattr(numba_screen, "pays", lambda *sizes: True)
    assert_same(kernels.select_topk(*case.encoder, k=case.k), plain, case.k)
    assert numba_screen.batch(screen_of(case, False), 64) is None
    assert_same(kernels.select_batch(*case.encoder, budget=64), kernels.select_batch(*case.encoder, budget=64), 8)


def assert_same(one: kernels.SelectedPreActs, two: kernels.SelectedPreActs, k: int) -> None:
    assert torch.equal(one.row_ptr, two.row_ptr)
    assert torch.equal(one.indices.view(-1, k).sort(1).values, two.indices.view(-1, k).sort(1).values)
    torch.testing.assert_close(one.values.sort().values, two.values.sort().values, equal_nan=True)


def test_equal_latents_are_too_many_to_compute() -> None:
    case = cases.random_case(128, 16, 1024, 4)
    case = case._replace(W_enc=case.W_enc[:, :1].expand(-1, 1024).T.contiguous().T, b_enc=None)
    assert numba_screen.topk(screen_of(case, False), case.k)[2].numel() == 128
    found = kernels.select_topk(*case.encoder, k=4)
    assert torch.equal(found.indices.view(-1, 4), torch.arange(4).expand(128, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_left_to_the_float32_product(value: float) -> None:
    case = cases.random_case(128, 16, 256, 4)
    W_enc = case.W_enc.T.clone()
    W_enc[5, 2] = value
    screen = screen_of(case._replace(W_enc=W_enc.T), False)
    assert numba_screen.topk(screen, 4)[2].numel() == 128 and numba_screen.batch(screen, 16) is None


@pytest.mark.usefixtures("always")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    case = cases.random_case(200, 48, 1024, 8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kernels.select_topk(*case.encoder, k=8))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].indices, found[1].indices)


def test_what_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: True)
    with kernels.use_backend("numba"):
        assert dispatch.describe().endswith("screened in bfloat16")
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: False)
    with kernels.use_backend("numba"):
        assert "bfloat16" not in dispatch.describe()
    assert not numba_screen.pays(4096, 576, 16_384, 32)


def test_small_selections_are_not_screened() -> None:
    assert not numba_screen.pays(64, 576, 16_384, 32)  # few rows
    assert not numba_screen.pays(4096, 16, 512, 8)  # little work
    assert not numba_screen.pays(4096, 576, 256, 32)  # k is a large part of the width


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("weaker", [1.0, 0.01])
def test_a_batch_in_pieces_whose_later_rows_are_weaker(weaker: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_BYTES", 2 * 512 * 128)  # 128 rows of bfloat16 at a time
    case = cases.random_case(300, 24, 512, 6)
    case = case._replace(x=torch.cat([case.x[:128], weaker * case.x[128:]]), b_enc=None, b_dec=None)
    assert (numba_screen.batch(screen_of(case, False), 1800) is None) == (weaker < 1)
    selected = kernels.select_batch(*case.encoder, budget=1800)
    z = oracle.pre_acts(*case.to(torch.float64).encoder)
    found = oracle.to_mask(selected.indices, selected.row_ptr, 512).reshape(1, -1)
    expected = torch.zeros(1, z.numel(), dtype=torch.bool).scatter_(1, z.reshape(1, -1).topk(1800).indices, True)
    oracle.check_selection(found, expected, z.reshape(1, -1), gap(case, z))

"""The forms of the Triton kernels that small cases do not reach on their own, and low-precision loads."""

from __future__ import annotations

import pytest
import torch

from saelab import kernels
from saelab.kernels import products
from saelab.kernels.cases import random_case
from saelab.kernels.dispatch import obstacle
from tests.kernels import oracle
from tests.kernels.backends import DEVICE, GPU, gap, tolerance

if obstacle("triton", DEVICE) is not None:
    pytest.skip(f"triton: {obstacle('triton', DEVICE)}", allow_module_level=True)

from saelab.kernels.triton import backend, ragged, select

pytestmark = [pytest.mark.gpu] if GPU else []
FORMS = {  # columns held by one program, and a width and budget that then take this form
    "whole": (4096, 300, 7),
    "two-level": (128, 700, 5),
    "two-level-ragged": (128, 777, 3),
    "streamed": (16, 100, 40),
    "streamed-k-1": (16, 100, 1),
    "smaller-groups": (64, 900, 12),  # 12 groups of 32 do not fit 128 columns, 12 of 8 do
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    held, width, k = FORMS[request.param]
    monkeypatch.setattr(select, "WHOLE", held)
    return width, k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True], ids=["plain", "magnitude"])
def test_selection_is_exact_in_every_form_and_dtype(form: tuple[int, int], dtype: torch.dtype, signed: bool) -> None:
    """Given the product there is no rounding: the winners are those of a stable sort, ties included."""
    width, k = form
    z = torch.randn(5, width, device=DEVICE).mul(4).round().div(4).to(dtype)  # many exact ties
    z[0], z[1, ::3], z[2, 5:] = 0.5, float("nan"), float("-inf")
    z[3, 7], z[4, 9], z[3, 8], z[3, 6] = float("inf"), float("nan"), -0.0, 0.0
    n, bias = z.shape[0], z.new_zeros(width)
    values, indices = torch.empty(n * k, device=DEVICE), torch.empty(n * k, dtype=torch.int64, device=DEVICE)
    start = torch.arange(n + 1, device=DEVICE) * k
    budgets = start.diff()
    mode = backend.MODES[signed]
    backend.choose(z, z, bias, mode, (1.0, 0.0), budgets, k, start[:-1], values, indices)
    expected = oracle.topk_mask(oracle.key(z.double(), signed), k)
    assert torch.equal(oracle.to_mask(indices, start, width), expected)
    torch.testing.assert_close(values.view(n, k), z.float().gather(1, indices.view(n, k)), equal_nan=True)


def test_rows_may_have_budgets_of_their_own(form: tuple[int, int]) -> None:
    width, k = form
    z, budgets = torch.randn(4, width, device=DEVICE), torch.tensor([0, k, 1, 0], device=DEVICE)
    ptr = torch.cat([budgets[:1], budgets.cumsum(0)])
    values, indices = torch.full((k + 1,), 7.0, device=DEVICE), torch.full((k + 1,), -1, device=DEVICE)
    backend.choose(z, z, z.new_zeros(width), 0, (1.0, 0.0), budgets, k, ptr, values, indices)
    found = oracle.to_mask(indices, ptr, width)
    assert torch.equal(found[1:3], torch.cat([oracle.topk_mask(z[1:2], k), oracle.topk_mask(z[2:3], 1)]))
    assert found.sum().item() == k + 1


def test_a_batch_budget_that_gathers_on_few_rows_is_exact() -> None:
    """One loud token takes most of what twenty share."""
    case = random_case(20, 12, 200, 2).to(DEVICE)
    case.x[3] *= 30
    with kernels.use_backend("triton"):
        selected = kernels.select_batch(*case.encoder, budget=40)
    z = oracle.pre_acts(*(t.double() for t in case.encoder))
    found = oracle.to_mask(selected.indices, selected.row_ptr, 200).reshape(1, -1)
    oracle.check_selection(found, oracle.topk_mask(z.reshape(1, -1), 40), z.reshape(1, -1), gap(case, z))
    assert selected.row_ptr.diff()[3] > 32


def test_gradient_scores_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the pre-activations nor the effects of all latents are ever held for the whole batch."""
    monkeypatch.setattr(products, "MIN_ROWS", 4)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    monkeypatch.setattr(products, "DEVICE_CHUNK_BYTES", 1)
    held, original = [], products.torch.mm
    monkeypatch.setattr(products.torch, "mm", lambda *a, **b: held.append(len(a[0])) or original(*a, **b))
    case = random_case(18, 12, 96, 5).to(DEVICE)
    grads = torch.randn(18, 12, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with kernels.use_backend("triton"):
        found = kernels.select_gradient_topk(case.x, grads, *case.encoder[1:], case.W_dec, 5, 2.0, "none")
    assert max(held) <= 4 and len(held) == 10
    z = oracle.pre_acts(*(t.double() for t in case.encoder))
    score = z.relu() * (1 + 2 * (grads.double() @ case.W_dec.double().T).abs())
    mask = oracle.to_mask(found.indices, found.row_ptr, 96)
    oracle.check_selection(mask, oracle.topk_mask(score, 5), score, gap(case, score))


@pytest.mark.parametrize("counts", [[0, 3, 4, 20, 0, 1, 9], [37], [6, 7, 7, 6, 7, 4], [7, 0, 0, 30]], ids=str)
@pytest.mark.parametrize("project", [False, True])
def test_popular_latents_are_summed_in_segments(
    counts: list[int], project: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two of them share a segment, or one begins or ends with a segment; entries of value 0 did not fire."""
    monkeypatch.setattr(ragged, "segment_size", lambda *_: 3)
    n_latents, n = len(counts), sum(counts)
    indices = torch.repeat_interleave(torch.arange(n_latents), torch.tensor(counts))[torch.randperm(n)].to(DEVICE)
    values, weight, along, extra = (torch.randn(n, device=DEVICE) for _ in range(4))
    values[::5] = 0
    error, x, offset, W_dec = (torch.randn(*s, 10, device=DEVICE) for s in ((n,), (n,), (), (n_latents,)))
    by = ragged.by_latent(indices, torch.arange(n + 1, device=DEVICE), n_latents)
    found = ragged.latent_grads(by, values, weight, along, extra, error, x, offset, W_dec if project else None)
    again = ragged.latent_grads(by, values, weight, along, extra, error, x, offset, W_dec if project else None)
    g = (along * weight + extra).double() * (values != 0)
    expected = torch.zeros(3, n_latents, 10, dtype=torch.float64, device=DEVICE)
    expected[0].index_add_(0, indices, (values * weight).double()[:, None] * error.double())
    expected[1].index_add_(0, indices, g[:, None] * (x - offset).double())
    expected[2, :, 0].index_add_(0, indices, g)
    if project:
        unit = torch.nn.functional.normalize(W_dec.double(), dim=1)
        expected[0] -= (expected[0] * unit).sum(1, keepdim=True) * unit
        squares = expected.square().sum((0, 2))
        torch.testing.assert_close(found.scale.double(), 1 / W_dec.double().norm(dim=1), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.squares.double(), squares, rtol=1e-5, atol=1e-5)
    case = random_case(n, 10, n_latents, 1)
    torch.testing.assert_close(found.dec.double(), expected[0], **tolerance(case, expected[0]))
    torch.testing.assert_close(found.enc.double(), expected[1], **tolerance(case, expected[1]))
    torch.testing.assert_close(found.bias.double(), expected[2, :, 0], **tolerance(case, expected[2]))
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, again))


def test_a_wide_token_takes_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "WIDEST", 8)
    case = random_case(4, 12, 30, 3).to(DEVICE)
    with kernels.use_backend("triton"):
        selected = kernels.select_topk(*case.encoder, k=3)
        values = selected.values.clone().requires_grad_()
        sse, recon = kernels.sse(case.x, values, *selected[1:], case.W_dec, case.b_dec)
        sse.sum().backward()
    with kernels.use_backend("reference"):
        again = selected.values.clone().requires_grad_()
        expected, expected_recon = kernels.sse(case.x, again, *selected[1:], case.W_dec, case.b_dec)
        expected.sum().backward()
    for a, b in ((sse, expected), (recon, expected_recon), (values.grad, again.grad)):
        torch.testing.assert_close(a, b, **tolerance(case, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_data(dtype: torch.dtype) -> None:
    """Sums run in float32; only what is stored is rounded, so it agrees with float32 on the rounded inputs."""
    case = random_case(6, 12, 40, 4).to(DEVICE, dtype)
    wide = case.to(torch.float32)
    with kernels.use_backend("triton"):
        selected = kernels.select_topk(*wide.encoder, k=4)
        sse, recon = kernels.sse(case.x, selected.values.to(dtype), *selected[1:], case.W_dec, case.b_dec)
        values = selected.values.to(dtype).float()
        expected, expected_recon = kernels.sse(wide.x, values, *selected[1:], wide.W_dec, wide.b_dec)
    assert sse.dtype == recon.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(recon.float(), expected_recon, rtol=eps, atol=eps)
    torch.testing.assert_close(sse.float(), expected, rtol=2 * eps, atol=eps)

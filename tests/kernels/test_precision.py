"""Selection from a product with operands in bfloat16: what stays exact, and that values are never rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saelab import kernels
from saelab.data.cache import ActivationCache
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.features.indexing.builder import build_index
from saelab.kernels import candidates, products
from saelab.kernels.cases import CASES, Case, random_case
from saelab.kernels.dispatch import obstacle
from saelab.kernels.precision import arithmetic, current, rounds
from saelab.sae import build
from saelab.sparse import SparseCode
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS, DEVICE, backend_on, gap, tolerance

SIGNS = pytest.mark.parametrize("signed", [False, True], ids=["relu", "signed"])
TRITON = pytest.mark.skipif(bool(obstacle("triton", DEVICE)), reason=f"triton: {obstacle('triton', DEVICE)}")
FINITE = sorted(set(CASES) - {"minus-infinity"})


@pytest.fixture(params=[place for place in BACKENDS if place != "numba"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the tensors go, on a place that rounds."""
    with backend_on(request.param) as (device, _), kernels.use_precision("bf16"):
        yield device


def pre_acts(case: Case) -> Tensor:
    return oracle.pre_acts(*(None if t is None else t.double() for t in case.encoder))


def halved(case: Case) -> Tensor:
    """How far rounding both operands may move a pre-activation, ``[n, d_sae]``."""
    x = case.x.double() if case.b_dec is None else case.x.double() - case.b_dec.double()
    return 2.0**-8 * 1.01 * (x.abs() @ case.W_enc.double().abs())


def check(case: Case, selected: kernels.SelectedPreActs, score: Tensor, expected: Tensor, signed: bool) -> None:
    """The right number per row; what stands in for a better one is no worse than rounding allows; values in float32."""
    found = oracle.to_mask(selected.indices, selected.row_ptr, score.shape[1])
    assert found.sum() == expected.sum()
    worst = torch.where(found & ~expected, score + halved(case), torch.inf).amin()
    missed = torch.where(expected & ~found, score - halved(case), -torch.inf).amax()
    assert missed <= worst
    code = oracle.dense_code(pre_acts(case), found, signed)
    dense = oracle.to_dense(selected.values.double(), selected.indices, selected.row_ptr, score.shape[1])
    torch.testing.assert_close(dense, code, **tolerance(case, code))


@pytest.mark.parametrize("name", FINITE)
@SIGNS
def test_topk(device: str, name: str, signed: bool) -> None:
    case = CASES[name]().to(device)
    score = oracle.key(pre_acts(case), signed)
    selected = kernels.select_topk(*case.encoder, k=case.k, signed=signed)
    check(case, selected, score, oracle.topk_mask(score, case.k), signed)


@pytest.mark.parametrize("name", FINITE)
@SIGNS
@pytest.mark.parametrize("share", [0.02, 0.4, 1.0])
def test_batch(device: str, name: str, signed: bool, share: float) -> None:
    case = CASES[name]().to(device)
    score = oracle.key(pre_acts(case), signed)
    budget = max(1, int(share * score.numel()))
    selected = kernels.select_batch(*case.encoder, budget=budget, signed=signed)
    expected = oracle.topk_mask(score.reshape(1, -1), budget).view_as(score)
    check(case, selected, score, expected, signed)


@pytest.mark.parametrize("name", FINITE)
@SIGNS
def test_latent(device: str, name: str, signed: bool) -> None:
    case = CASES[name]().to(device)
    score = oracle.key(pre_acts(case), signed)
    budgets = torch.arange(score.shape[1], device=score.device) % (score.shape[0] + 2)
    selected = kernels.select_latent(*case.encoder, budgets=budgets, signed=signed)
    told = budgets.clamp_max(score.shape[0])
    sizes = int(told.sum()), score.shape[0]
    again = kernels.select_latent(*case.encoder, budgets=told, signed=signed, sizes=sizes)
    assert all(map(torch.equal, selected, again)), "sizes that are known change nothing"
    expected = torch.cat([oracle.topk_mask(row[None], int(m)) for row, m in zip(score.T, budgets)]).T
    check(case, selected, score, expected, signed)
    found = oracle.to_mask(selected.indices, selected.row_ptr, score.shape[1])
    assert torch.equal(found.sum(0), budgets.clamp_max(score.shape[0]))


@pytest.mark.parametrize("beta", [0.7, math.inf])
@SIGNS
def test_gradient_scores(device: str, signed: bool, beta: float) -> None:
    case = random_case(9, 12, 96, 8).to(device)
    grads = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5)).to(device)
    selected = kernels.select_gradient_topk(case.x, grads, *case.encoder[1:], case.W_dec, case.k, beta, "rms", signed)
    exact = kernels.select_gradient_topk
    with kernels.use_precision("fp32"):
        expected = exact(case.x, grads, *case.encoder[1:], case.W_dec, case.k, beta, "rms", signed)
    # Eight more candidates than winners out of 96 leave nothing to chance here.
    masks = [oracle.to_mask(code.indices, code.row_ptr, 96) for code in (selected, expected)]
    assert torch.equal(*masks)
    dense = [oracle.to_dense(*code, 96) for code in (selected, expected)]
    torch.testing.assert_close(*dense, **tolerance(case, dense[1]))


@pytest.mark.parametrize("name", FINITE)
@SIGNS
@pytest.mark.parametrize("most", [1.0, 0.0], ids=["candidates", "dense"])
def test_thresholds_are_decided_in_float32(
    device: str, name: str, signed: bool, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rounding does, also where it would move an entry across; of a dense code 16 bits decide."""
    monkeypatch.setattr(candidates, "DENSE", most)
    case = CASES[name]().to(device)
    z = pre_acts(case)
    cut = torch.linspace(-0.2, 0.9, z.shape[1]).to(device)
    near = z[0].abs() if signed else z[0]
    cut[::2] = (near + 1e-4 * near.abs().max())[::2].float()  # half of a row is short of the threshold by a hair
    selected = kernels.select_threshold(*case.encoder, threshold=cut, signed=signed)
    found = oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1])
    distance = (z.abs() if signed else z) - cut.double()
    allowed = gap(case, z) + (0 if most else 2.0**-8 * halved(case))
    clear = distance.abs() > allowed
    assert torch.equal(found[clear], distance[clear] > 0)
    code = torch.where(found, z, 0.0)
    dense = oracle.to_dense(selected.values.double(), selected.indices, selected.row_ptr, z.shape[1])
    assert (dense - code).abs().max() <= (gap(case, z) if most else float(2.0**-8 * halved(case).max() + gap(case, z)))


def test_activations_far_from_the_origin_are_centred_before_rounding(device: str) -> None:
    """Rounded first, those of a model with large means would all look the same."""
    case = random_case(30, 12, 96, 8).to(device)
    far = case._replace(x=case.x + 1000, b_dec=case.b_dec + 1000)
    selected = kernels.select_topk(*far.encoder, k=8)
    with kernels.use_precision("fp32"):
        expected = kernels.select_topk(*far.encoder, k=8)
    masks = [oracle.to_mask(code.indices, code.row_ptr, 96) for code in (selected, expected)]
    assert torch.equal(*masks)


def test_no_tokens(device: str) -> None:
    case = random_case(0, 6, 20, 3).to(device)
    budgets = torch.full((20,), 2).to(device)
    for selected in (
        kernels.select_topk(*case.encoder, k=3),
        kernels.select_threshold(*case.encoder, threshold=0.5),
        kernels.select_latent(*case.encoder, budgets=budgets),
    ):
        assert selected.values.numel() == 0 and selected.row_ptr.tolist() == [0]


def test_autocast_means_the_same_as_bf16() -> None:
    case = random_case(9, 12, 96, 8)
    with kernels.use_backend("reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rounds(case.x)
            found = kernels.select_topk(*case.encoder, k=8)
        with kernels.use_precision("bf16"):
            expected = kernels.select_topk(*case.encoder, k=8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_auto_is_fp32_on_a_cpu_and_half_precision_is_left_alone() -> None:
    assert arithmetic("auto", "cpu") == "fp32" and arithmetic("bf16", "cpu") == "bf16"
    with kernels.use_precision("bf16"):
        assert rounds(torch.ones(1, 1)) and not rounds(torch.ones(1, 1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="unknown precision 'tf32'; choose from auto, fp32, bf16"):
        kernels.use_precision("tf32").__enter__()  # pyright: ignore


@pytest.mark.parametrize("command", ["evaluate", "index"])
def test_evaluation_and_index_select_as_training_does_unless_told(command: str, tmp_path: Path) -> None:
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(64, 8), torch.arange(64), context_length=16)
    sae, used = build("topk", d_in=8, d_sae=32, k=2), []
    encode = sae.encode

    def watched(*args: Any) -> SparseCode:
        used.append(current())
        return encode(*args)

    sae.encode = watched  # pyright: ignore[reportAttributeAccessIssue]

    def work(folder: str) -> None:
        if command == "evaluate":
            evaluate(sae, cache, config=EvaluateConfig(split="all"))
        else:
            build_index(sae, cache, tmp_path / folder, token_strings=[str(i) for i in range(64)])

    work("usual")
    assert set(used) == {"auto"} and current() == "fp32"
    used.clear()
    with kernels.use_precision("fp32"):
        work("told")
    assert set(used) == {"fp32"}


def test_split_operands_keep_sixteen_bits() -> None:
    x, W = torch.randn(40, 300) * 1e3, torch.randn(300, 50)
    exact, (left, right) = x.double() @ W.double(), products.split(x, W)
    assert left.dtype == right.dtype == torch.bfloat16
    error = (left.double() @ right.double() - exact).abs() / (x.double().abs() @ W.double().abs())
    assert error.max() < 2.0**-16


TIED: dict[str, Callable[[], Tensor]] = {
    "all equal": lambda: torch.full((40, 200), 0.5),
    "few levels": lambda: torch.randn(40, 200, generator=torch.Generator().manual_seed(0)).round(),
    "one loud row": lambda: torch.cat([torch.ones(39, 200), torch.full((1, 200), 9.0)]),
    "not finite": lambda: torch.full((40, 200), -torch.inf).masked_fill(torch.eye(40, 200) > 0, torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("budget", [1, 39, 300, 2000, 7999, 8000])
@SIGNS
@TRITON
def test_a_batch_budget_with_ties_is_exact(
    dtype: torch.dtype, name: str, budget: int, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product is the data itself, in five chunks: equal keys go to the lowest token, then the lowest latent."""
    z = TIED[name]().to(DEVICE, dtype)
    monkeypatch.setattr("saelab.kernels.triton.backend.wide_products", lambda x, W: chunks(z.float()))
    x, W, bias = z.new_zeros(40, 3), z.new_zeros(3, 200), z.new_full((200,), 0.003)
    with kernels.use_backend("triton"):
        selected = kernels.select_batch(x, W, bias, None, budget, signed)
    z = z.float() + bias.float()  # bfloat16 rounds 0.503 up
    score = oracle.key(z.double(), signed)
    expected = torch.zeros(8000, dtype=torch.bool, device=DEVICE)
    expected[score.flatten().sort(descending=True, stable=True).indices[:budget]] = True
    found = oracle.to_mask(selected.indices, selected.row_ptr, 200)
    assert torch.equal(found.flatten(), expected)
    values = z.flatten()[expected]
    values = (values if signed else values.relu()).to(dtype)
    torch.testing.assert_close(selected.values, values, rtol=0, atol=0, equal_nan=True)


def chunks(z: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, 40, 8):
        yield start, z[start : start + 8].clone()


class NoWaiting(TorchDispatchMode):
    """Fails on operations whose result's size, or whose number in Python, the host would have to wait for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert not any(name.startswith(wait) for wait in self.WAITS), f"{name} waits for the GPU"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, "the size of repeat_interleave is not given"
        if name == "index":
            assert all(t is None or t.dtype != torch.bool for t in args[1]), "a mask as index waits for the GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@TRITON
def test_budgets_are_spent_without_waiting_for_the_gpu(precision: kernels.Precision) -> None:
    case = random_case(20, 12, 200, 4).to(DEVICE)
    grads = torch.randn_like(case.x)
    with kernels.use_backend("triton"), kernels.use_precision(precision), NoWaiting():
        kernels.select_topk(*case.encoder, k=4)
        kernels.select_batch(*case.encoder, budget=80)
        kernels.select_gradient_topk(case.x, grads, *case.encoder[1:], case.W_dec, 4, 1.0)

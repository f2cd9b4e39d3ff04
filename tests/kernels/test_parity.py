"""Every backend against dense float64 definitions: the same sets, values and gradients, on adversarial cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saelab import kernels
from saelab.kernels.cases import CASES, Case, random_case
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS, backend_on, gap, tolerance

SIGNS = pytest.mark.parametrize("signed", [False, True], ids=["relu", "signed"])
EVERY_CASE = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def leaves(case: Case) -> list[Tensor]:
    """Fresh float64 copies of the tensors, that ask for gradients; the dtype's rounding has already happened."""
    return [t.detach().double().requires_grad_() for t in case if isinstance(t, Tensor)]


def doubled(case: Case) -> Case:
    fields = iter(leaves(case))
    return Case(*(next(fields) if isinstance(t, Tensor) else t for t in case))  # pyright: ignore


def trainable(case: Case) -> Case:
    return Case(*(t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in case))  # pyright: ignore


def assert_gradients_match(found: Case, expected: Case, case: Case) -> None:
    for name, a, b in zip(Case._fields, found, expected):
        if not isinstance(a, Tensor):
            continue
        want = torch.zeros_like(b) if b.grad is None else b.grad
        got = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(got.double(), want, **tolerance(case, want), msg=lambda m, name=name: f"{name}: {m}")


def weighted_loss(sse: Tensor) -> Tensor:
    """Tokens weigh differently, so that a gradient that forgets its row is wrong."""
    return (sse * torch.linspace(0.5, 1.5, sse.numel()).to(sse)).sum()


@EVERY_CASE
@SIGNS
def test_topk_then_loss_matches_dense_autograd(backend: str, name: str, signed: bool) -> None:
    with backend_on(backend) as where:
        case = CASES[name]().to(*where)
        mine, theirs = trainable(case), doubled(case)
        selected = kernels.select_topk(*mine.encoder, k=mine.k, signed=signed)
        z = oracle.pre_acts(*theirs.encoder)
        found = oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1])
        score = oracle.key(z.detach(), signed)
        oracle.check_selection(found, oracle.topk_mask(score, case.k), score, gap(case, score))
        values = kernels.pre_acts_at(*mine.encoder, selected)
        code = oracle.dense_code(z, found, signed)
        compare_loss(mine, theirs, values, selected.indices, selected.row_ptr, code, case)


def test_unclipped_winners_keep_their_value_and_their_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same winners as clipped ones; most are below zero here."""
    sizes = [40]
    if backend == "numba":  # it has two ways to select
        from saelab.kernels.numba import screen

        monkeypatch.setattr(screen, "pays", lambda *size: size[2] > 500)
        sizes.append(600)
    for d_sae in sizes:
        unclipped(backend, random_case(24, 16, d_sae, d_sae // 5)._replace(b_enc=-9 * torch.ones(d_sae)))


def unclipped(backend: str, case: Case) -> None:
    with backend_on(backend) as where:
        case = case.to(*where)
        mine, theirs = trainable(case), doubled(case)
        clipped = kernels.select_topk(*mine.encoder, k=mine.k)
        selected = kernels.select_topk(*mine.encoder, k=mine.k, clip=False)
        assert torch.equal(selected.indices, clipped.indices) and torch.equal(selected.values.relu(), clipped.values)
        assert (selected.values < 0).float().mean() > 0.5
        values = kernels.pre_acts_at(*mine.encoder, selected)
        z = oracle.pre_acts(*theirs.encoder).gather(1, selected.indices.view(24, -1)).flatten()
        torch.testing.assert_close(values.detach().double(), z.detach(), **tolerance(case, z.detach()))
        weights = torch.linspace(0.5, 1.5, values.numel()).to(values)
        (values * weights).sum().backward()
        (z * weights).sum().backward()
        assert_gradients_match(mine, theirs, case)


def compare_loss(mine: Case, theirs: Case, values: Tensor, indices: Tensor, row_ptr: Tensor, code: Tensor, case: Case):
    dense = oracle.to_dense(values.detach().double(), indices, row_ptr, code.shape[1])
    torch.testing.assert_close(dense, code.detach(), **tolerance(case, code))
    if not code.isfinite().all():  # a magnitude of infinity wins, and there is nothing to reconstruct
        return
    sse, recon = kernels.sse(mine.x, values, indices, row_ptr, mine.W_dec, mine.b_dec)
    expected = code @ theirs.W_dec + (0 if theirs.b_dec is None else theirs.b_dec)
    errors = (expected - theirs.x).square().sum(1)
    torch.testing.assert_close(recon.double(), expected.detach(), **tolerance(case, expected))
    torch.testing.assert_close(sse.double(), errors.detach(), **tolerance(case, errors))
    assert not recon.requires_grad
    weighted_loss(sse).backward()
    weighted_loss(errors).backward()
    assert_gradients_match(mine, theirs, case)


@EVERY_CASE
def test_decode_matches_a_dense_product(backend: str, name: str) -> None:
    with backend_on(backend) as where:
        case = CASES[name]().to(*where)
        mine, theirs = trainable(case), doubled(case)
        selected = kernels.select_topk(*case.encoder, k=case.k, signed=True)
        values = selected.values.nan_to_num(neginf=-2.0).requires_grad_()
        recon = kernels.decode(values, selected.indices, selected.row_ptr, mine.W_dec, mine.b_dec)
        dense_values = values.detach().double().requires_grad_()
        dense = oracle.to_dense(dense_values, selected.indices, selected.row_ptr, case.W_dec.shape[0])
        expected = dense @ theirs.W_dec + (0 if theirs.b_dec is None else theirs.b_dec)
        torch.testing.assert_close(recon.double(), expected.detach(), **tolerance(case, expected))
        direction = torch.randn(recon.shape, dtype=torch.float64).to(recon.device)
        (recon.double() * direction).sum().backward()
        (expected * direction).sum().backward()
        torch.testing.assert_close(values.grad.double(), dense_values.grad, **tolerance(case, dense_values.grad))
        assert_gradients_match(mine, theirs, case)


@EVERY_CASE
@SIGNS
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["one", "some", "all"])
def test_batch_budget(backend: str, name: str, signed: bool, share: float) -> None:
    with backend_on(backend) as where:
        case = CASES[name]().to(*where)
        z = oracle.pre_acts(*doubled(case).encoder).detach()
        budget = max(1, int(share * z.numel()))
        selected = kernels.select_batch(*case.encoder, budget=budget, signed=signed)
        score = oracle.key(z, signed)
        found = oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1])
        expected = oracle.topk_mask(score.reshape(1, -1), budget)
        oracle.check_selection(found.reshape(1, -1), expected, score.reshape(1, -1), gap(case, score))
        check_values(case, selected, oracle.dense_code(z, found, signed))


def check_values(case: Case, selected: kernels.SelectedPreActs, code: Tensor) -> None:
    dense = oracle.to_dense(selected.values.double(), selected.indices, selected.row_ptr, code.shape[1])
    torch.testing.assert_close(dense, code, **tolerance(case, code))


@EVERY_CASE
@SIGNS
def test_latent_budgets(backend: str, name: str, signed: bool) -> None:
    with backend_on(backend) as where:
        case = CASES[name]().to(*where)
        z = oracle.pre_acts(*doubled(case).encoder).detach()
        # None, some, all, and more than there are.
        budgets = torch.arange(z.shape[1], device=z.device) % (z.shape[0] + 2)
        selected = kernels.select_latent(*case.encoder, budgets=budgets, signed=signed)
        told = budgets.clamp_max(z.shape[0])
        sizes = int(told.sum()), z.shape[0]
        again = kernels.select_latent(*case.encoder, budgets=told, signed=signed, sizes=sizes)
        assert all(map(torch.equal, selected, again)), "sizes that are known change nothing"
        score = oracle.key(z, signed).T
        found = oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1])
        expected = torch.cat([oracle.topk_mask(row[None], int(m)) for row, m in zip(score, budgets)])
        oracle.check_selection(found.T, expected, score, gap(case, score))
        check_values(case, selected, oracle.dense_code(z, found, signed))


@EVERY_CASE
@SIGNS
@pytest.mark.parametrize("each", [False, True], ids=["one-cut", "cut-per-latent"])
def test_threshold(backend: str, name: str, signed: bool, each: bool) -> None:
    with backend_on(backend) as where:
        case = CASES[name]().to(*where)
        z = oracle.pre_acts(*doubled(case).encoder).detach()
        cut = torch.linspace(0.2, 0.9, z.shape[1]).to(*where) if each else 0.61
        selected = kernels.select_threshold(*case.encoder, threshold=cut, signed=signed)
        found = oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1])
        distance = (z.abs() if signed else z) - torch.as_tensor(cut).double()
        clear = distance.abs() > gap(case, z)
        assert torch.equal(found[clear], distance[clear] > 0)
        check_values(case, selected, torch.where(found, z, 0.0))


@EVERY_CASE
@SIGNS
@pytest.mark.parametrize(("beta", "norm"), [(0.0, "rms"), (0.7, "rms"), (0.7, "none"), (math.inf, "rms")])
def test_gradient_scores(backend: str, name: str, signed: bool, beta: float, norm: str) -> None:
    with backend_on(backend) as where:
        case = CASES[name]().to(*where)
        grads = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5)).to(*where)
        selected = kernels.select_gradient_topk(
            case.x, grads, case.W_enc, case.b_enc, case.b_dec, case.W_dec, case.k, beta, norm, signed
        )
        z = oracle.pre_acts(*doubled(case).encoder).detach()
        effect = (grads.double() @ case.W_dec.double().T).abs()
        effect = effect / effect.square().mean().sqrt() if norm == "rms" and math.isfinite(beta) else effect
        weight = effect if math.isinf(beta) else 1 + beta * effect
        score = oracle.key((z.abs() if signed else z.relu()) * weight, False)
        found = oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1])
        oracle.check_selection(found, oracle.topk_mask(score, case.k), score, gap(case, score))
        check_values(case, selected, oracle.dense_code(z, found, signed))


PURSUITS = {
    "ordinary": (random_case(6, 12, 40, 1), 5, {}),
    "many-steps": (random_case(3, 6, 10, 1), 30, {}),
    "stop-early": (random_case(8, 12, 64, 1), 12, {"residual_stop": 1.5}),
    "stop-on-repeat": (random_case(5, 4, 12, 1), 20, {"stop_on_repeat": True}),
    "free-norms": (random_case(5, 10, 30, 1), 6, {}),
    "one-row": (random_case(1, 9, 20, 1), 4, {}),
    "no-bias": (random_case(4, 9, 20, 1)._replace(b_dec=None), 4, {}),
    "one-atom": (random_case(5, 4, 1, 1), 3, {}),
}


@pytest.mark.parametrize("name", PURSUITS)
def test_pursuit_matches_the_naive_loop(backend: str, name: str) -> None:
    with backend_on(backend) as where:
        case, steps, options = PURSUITS[name]
        if name == "free-norms":
            case = case._replace(W_dec=case.W_dec * torch.linspace(0.6, 1.1, 30)[:, None])
        case = case.to(*where)
        mine, theirs = trainable(case), doubled(case)
        found = kernels.pursuit(mine.x, mine.W_dec, mine.b_dec, steps, **options)
        expected = oracle.pursuit(theirs.x, theirs.W_dec, theirs.b_dec, steps, **options)
        oracle.to_mask(found.indices, found.row_ptr, expected.shape[1])  # each atom once
        dense = oracle.to_dense(found.values, found.indices, found.row_ptr, expected.shape[1])
        torch.testing.assert_close(dense.double(), expected.detach(), **tolerance(case, expected))
        weights = torch.randn(expected.shape, dtype=torch.float64).to(expected.device)
        (dense.double() * weights).sum().backward()
        (expected * weights).sum().backward()
        assert_gradients_match(mine, theirs, case)


def test_nothing_to_do(backend: str) -> None:
    """No tokens, and rows without entries."""
    with backend_on(backend) as where:
        case = random_case(0, 6, 20, 3).to(*where)
        for selected in (
            kernels.select_topk(*case.encoder, k=3),
            kernels.select_threshold(*case.encoder, threshold=0.5),
            kernels.pursuit(case.x, case.W_dec, case.b_dec, 3),
            kernels.select_latent(*case.encoder, budgets=torch.full((20,), 2, device=where[0])),
        ):
            assert selected.values.numel() == 0 and selected.row_ptr.tolist() == [0]
        code = (
            torch.tensor([2.0]).to(*where).requires_grad_(),
            *(torch.tensor(t, device=where[0]) for t in ([4], [0, 0, 1, 1])),
        )
        x = torch.ones(3, 6).to(*where)
        W_dec = case.W_dec.clone().requires_grad_()
        sse, recon = kernels.sse(x, *code, W_dec, None)
        expected = torch.stack([torch.zeros(6).to(*where), 2 * case.W_dec[4], torch.zeros(6).to(*where)])
        torch.testing.assert_close(recon, expected, rtol=1e-6, atol=1e-6)
        sse.sum().backward()
        assert W_dec.grad.abs().sum(1).nonzero().squeeze(1).tolist() == [4]


def test_nan_ranks_below_everything(backend: str) -> None:
    """A NaN pre-activation never displaces a number; a row of nothing else shows its NaN."""
    with backend_on(backend) as where:
        case = random_case(3, 8, 24, 5).to(*where)
        case.b_enc[2] = float("nan")
        case.x[1, 0] = float("nan")
        selected = kernels.select_topk(*case.encoder, k=5)
        values, indices = selected.values.view(3, 5), selected.indices.view(3, 5)
        assert values[1].isnan().all() and sorted(indices[1].tolist()) == [0, 1, 2, 3, 4]
        assert not values[[0, 2]].isnan().any() and 2 not in indices[[0, 2]]

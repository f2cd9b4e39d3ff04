"""The loss with one gradient pass is the composition of its parts, and its gradients are those of dense autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from saelab import kernels
from saelab.kernels.cases import CASES, Case
from saelab.kernels.dispatch import implementation
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS, backend_on, tolerance
from tests.kernels.test_parity import SIGNS, assert_gradients_match, doubled, trainable, weighted_loss


def reconstruct(case: Case, signed: bool, **more):
    selected = kernels.select_topk(*case.encoder, k=case.k, signed=signed)
    encoder = case.encoder[1:]
    return selected, kernels.reconstruct(case.x, encoder, (case.W_dec, case.b_dec), selected, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@SIGNS
def test_it_matches_dense_autograd(backend: str, name: str, signed: bool) -> None:
    """With a second loss on the values, whose gradient takes the same pass."""
    with backend_on(backend) as where:
        case = CASES[name]().to(*where)
        mine, theirs = trainable(case), doubled(case)
        if not kernels.select_topk(*case.encoder, k=case.k, signed=signed).values.isfinite().all():
            return  # a magnitude of infinity wins, and there is nothing to reconstruct
        selected, (sse, recon, values) = reconstruct(mine, signed)
        z = oracle.pre_acts(*theirs.encoder)
        code = oracle.dense_code(z, oracle.to_mask(selected.indices, selected.row_ptr, z.shape[1]), signed)
        expected = code @ theirs.W_dec + (0 if theirs.b_dec is None else theirs.b_dec)
        errors = (expected - theirs.x).square().sum(1)
        torch.testing.assert_close(recon.double(), expected.detach(), **tolerance(case, expected))
        (weighted_loss(sse) + values.sum()).backward()
        (weighted_loss(errors) + code.sum()).backward()
        assert_gradients_match(mine, theirs, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_its_parts_and_sorts_the_code_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with backend_on(backend) as where:
        case, sorts = CASES["ordinary"]().to(*where), []
        ops = implementation(case.x)
        monkeypatch.setattr(ops, "by_latent", lambda *args, sort=ops.by_latent: sorts.append(1) or sort(*args))
        one, two = trainable(case), trainable(case)
        _, (sse, *_) = reconstruct(one, False)
        weighted_loss(sse).backward()
        assert len(sorts) == 1
        selected = kernels.select_topk(*two.encoder, k=two.k)
        by = kernels.ByLatent(*selected[1:], two.W_enc.shape[1])
        values = kernels.pre_acts_at(*two.encoder, selected, by)
        weighted_loss(kernels.sse(two.x, values, *selected[1:], two.W_dec, two.b_dec, by)[0]).backward()
        assert len(sorts) == 2
        for a, b in zip(one, two):
            if isinstance(a, Tensor):
                assert torch.equal(a.grad, b.grad) if backend == "numba" else torch.allclose(a.grad, b.grad)


def test_it_passes_gradcheck() -> None:
    def loss(x, W_enc, b_enc, b_in, W_dec):
        selected = kernels.select_topk(x, W_enc, b_enc, b_in, k=2)
        sse, _, values = kernels.reconstruct(x, (W_enc, b_enc, b_in), (W_dec, b_in), selected)
        return sse, values

    shapes = (3, 4), (4, 6), (6,), (4,), (6, 4)
    assert gradcheck(loss, tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes))


def test_no_float_is_added_up_in_an_open_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would use atomics on a GPU: then a resumed run would not be identical to the bit."""

    def refuse(*args, **kwargs):
        raise AssertionError("index_add_ or bincount with weights")

    monkeypatch.setattr(Tensor, "index_add_", refuse)
    monkeypatch.setattr(torch, "bincount", refuse)
    if "triton" not in BACKENDS:
        pytest.skip("needs Triton's interpreter")
    with backend_on("triton") as where:
        case = trainable(CASES["ordinary"]().to(*where))
        reconstruct(case, False)[1][0].sum().backward()
        assert case.b_enc is not None and case.b_enc.grad.isfinite().all()

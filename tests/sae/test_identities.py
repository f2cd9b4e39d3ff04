"""Where one variant must equal another, or a closed form; and gradients against autograd of the naive formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saelab import losses
from saelab.sae import SAE, build, restore
from saelab.sae.feature_choice import FeatureChoice
from saelab.sae.jump_relu import JumpReLU
from saelab.sae.matching_pursuit import MatchingPursuit
from saelab.sae.mutual_choice import REFIT, MutualChoice
from saelab.sparse import SparseCode

D_IN, D_SAE, N = 6, 15, 40


def pair(first: tuple[str, dict], second: tuple[str, dict]) -> tuple[SAE, SAE]:
    """Two variants in float64 with the same weights, in training mode."""
    a, b = (build(name, D_IN, D_SAE, **config).double().train() for name, config in (first, second))
    with torch.no_grad():
        for p in a.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        shared = {key: value for key, value in a.state_dict().items() if key in dict(b.named_parameters())}
    b.load_state_dict(shared, strict=False)
    return a, b


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, D_IN, dtype=torch.float64), torch.randn(n, D_IN, dtype=torch.float64)


def assert_same_codes(a: SAE, b: SAE, x: Tensor, grads: Tensor | None = None) -> None:
    assert torch.equal(a.encode(x, grads).dense(), b.encode(x, grads).dense())


@pytest.mark.parametrize("grad_norm", ["rms", "none"])
def test_gradient_topk_with_beta_zero_is_topk(grad_norm: str) -> None:
    a, b = pair(("topk", {"k": 4}), ("gradient_topk", {"k": 4, "beta": 0.0, "grad_norm": grad_norm}))
    assert_same_codes(a, b, *batch())


@pytest.mark.parametrize("beta", [1e9, math.inf])
def test_gradient_topk_with_large_beta_ranks_by_attribution(beta: float) -> None:
    _, sae = pair(("topk", {"k": 4}), ("gradient_topk", {"k": 4, "beta": beta}))
    x, grads = batch()
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    attribution = z * (grads @ sae.W_dec.T).abs()
    chosen = torch.zeros_like(z).scatter_(1, attribution.topk(4).indices, 1.0)
    torch.testing.assert_close(sae.encode(x, grads).dense(), z * chosen)


def test_gradient_topk_modes() -> None:
    x, grads = batch()
    plain, sae = pair(("topk", {"k": 4}), ("gradient_topk", {"k": 4, "grad_select": "eval_only"}))
    assert_same_codes(plain, sae, x, grads)  # training ignores gradients
    code = sae.encode(x, grads)
    sae.observe(x, code, grads)
    norm = (grads @ sae.W_dec.T).square().mean().sqrt()
    assert sae.gain.mean().item() == pytest.approx(1 / norm.item(), rel=1e-9)
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    chosen = torch.zeros_like(z).scatter_(1, (z * (1 + (grads @ sae.W_dec.T).abs() / norm)).topk(4).indices, 1.0)
    torch.testing.assert_close(sae.eval().encode(x, grads).dense(), z * chosen)
    with pytest.raises(ValueError, match="needs gradients"):
        sae.encode(x)


def test_mutual_choice_selects_like_batch_topk() -> None:
    a, b = pair(("batch_topk", {"k": 3}), ("mutual_choice", {"k": 3}))
    assert_same_codes(a, b, batch()[0])


@pytest.mark.parametrize("subtract", [False, True])
def test_batch_scope_of_abs_topk_is_signed_batch_topk(subtract: bool) -> None:
    """A file of 0.1.0 that selects magnitudes over the batch."""
    old = {"d_in": D_IN, "d_sae": D_SAE, "k": 3, "scope": "batch", "apply_b_dec_to_input": subtract}
    sae = restore("abs_topk", old).double().train()
    assert sae.variant == "batch_topk" and sae.signed
    with torch.no_grad():
        sae.b_dec.normal_()
    x, _ = batch()
    u = ((x - sae.b_dec) if subtract else x) @ sae.W_enc + sae.b_enc
    cut = u.abs().flatten().topk(3 * N).values[-1]
    torch.testing.assert_close(sae.encode(x).dense(), u * (u.abs() >= cut))
    per_token = restore("abs_topk", old | {"scope": "token"})
    assert per_token.variant == "abs_topk" and "scope" not in per_token.config


def test_abs_topk_is_topk_where_everything_is_positive() -> None:
    a, b = pair(("topk", {"k": 5}), ("abs_topk", {"k": 5}))
    with torch.no_grad():
        a.b_enc.fill_(50.0)
        b.b_enc.fill_(50.0)
    assert_same_codes(a, b, batch()[0])


def test_abs_topk_keeps_the_head_of_the_sorted_magnitudes() -> None:
    sae = build("abs_topk", D_IN, D_SAE, k=5, apply_b_dec_to_input=False).double()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    x, _ = batch()
    u = x @ sae.W_enc + sae.b_enc  # no pre-bias, as in the paper
    cut = u.abs().sort(dim=1, descending=True).values[:, 4:5]
    torch.testing.assert_close(sae.encode(x).dense(), u * (u.abs() >= cut))


def test_feature_choice_with_every_token_is_relu() -> None:
    a, b = pair(("relu", {}), ("feature_choice", {"k": D_SAE, "mutual_share": 0.0, "budgets": "uniform"}))
    x, _ = batch()
    torch.testing.assert_close(a.encode(x).dense(), b.encode(x).dense())
    b.calibrate([x])
    assert_same_codes(a.eval(), b.eval(), batch()[0])


def test_jump_relu_with_threshold_zero_is_relu() -> None:
    a, b = pair(("relu", {}), ("jump_relu", {"threshold": 0.0, "apply_b_dec_to_input": True}))
    assert_same_codes(a.eval(), b.eval(), batch()[0])


def test_gated_with_equal_halves_is_relu() -> None:
    a, b = pair(("relu", {}), ("gated", {}))
    with torch.no_grad():
        b.b_mag.copy_(b.b_enc)
    x, _ = batch()
    torch.testing.assert_close(a.encode(x).dense(), b.encode(x).dense())


def test_matryoshka_of_one_group_is_batch_topk() -> None:
    a, b = pair(("batch_topk", {"k": 3}), ("matryoshka", {"k": 3, "groups": (1.0,), "prefix_loss": "sum"}))
    x, _ = batch()
    for first, second in zip(a.reconstruction_loss(x, a.encode(x)), b.reconstruction_loss(x, b.encode(x))):
        torch.testing.assert_close(first, second)


def test_aux_zipf_of_the_dead_is_auxk() -> None:
    sae = build("mutual_choice", D_IN, D_SAE, k=3).double()
    assert isinstance(sae, MutualChoice)
    x, _ = batch()
    dead = torch.tensor([2, 7, 8])
    error = x - sae(x)
    for under_used, seen in [(0.1, 0), (0.0, REFIT)]:  # before the first fit; when nothing counts as under-used
        sae.under_used = under_used
        sae.seen.fill_(seen)
        terms = sae.aux_latents(dead, weight=1 / 32)
        values = {key: w * losses.auxk(sae, x, error, latents, 4) for key, (w, latents) in terms.items()}
        assert values["aux_zipf"] == values["auxk"] > 0


def test_under_used_latents_widen_auxk() -> None:
    sae = build("mutual_choice", D_IN, D_SAE, k=3, under_used=0.5)
    assert isinstance(sae, MutualChoice)
    law = torch.arange(1, D_SAE + 1, dtype=torch.float64) ** -1.0
    density = law * (3 / law.sum())
    density[13] *= 0.3  # fires far less than its rank should; ranks 0-12 and 14 are as expected
    sae.density.set_(density)
    sae.zipf.copy_(torch.tensor([0.0, 1.0, 1.0]))
    sae.seen.fill_(REFIT)
    _, latents = sae.aux_latents(torch.tensor([4]), 1.0)["aux_zipf"]
    assert latents.tolist() == [4, 13]


def test_no_latent_is_under_used_that_was_not_listed_ahead() -> None:
    """Whatever fires: some latents fall silent, others overtake them, until the list is renewed."""
    draw, steps, n = torch.Generator().manual_seed(3), 12, 100
    seen = set()
    for trial in range(40):
        sae = build("mutual_choice", D_IN, D_SAE, k=3, under_used=0.5, density_window=4000)
        assert isinstance(sae, MutualChoice)
        density = torch.rand(D_SAE, generator=draw, dtype=torch.float64) ** (1 + trial % 4)
        sae.density.update(density / density.sum() * 3, rate=0.05 if trial % 2 else 0.9)
        sae.zipf.copy_(torch.tensor([1.0, 1.2, 1.0]))
        sae.seen.fill_(REFIT)
        listed = sae.aux_ahead(n, steps)
        none = first = torch.zeros(D_SAE, dtype=torch.bool)
        for step in range(steps + 1):
            _, marked = sae.aux_marks(none, 1.0)["aux_zipf"]
            assert not (marked & ~listed).any(), (trial, step)
            seen |= {("listed", int(listed.sum()) < D_SAE), ("late", step > 0 and bool((marked & ~first).any()))}
            first = marked if step == 0 else first
            fired = (torch.rand(D_SAE, generator=draw) < 0.3) * torch.rand(D_SAE, generator=draw, dtype=torch.float64)
            sae.density.update(fired, rate=-math.expm1(-n / sae.density_window))
    assert ("listed", True) in seen and ("late", True) in seen, "some lists are short, and some marks come later"


def test_matching_pursuit_on_orthonormal_atoms_projects_exactly() -> None:
    sae = build("matching_pursuit", D_IN, D_IN, n_steps=D_IN).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.linalg.qr(torch.randn(D_IN, D_IN, dtype=torch.float64)).Q)
    x, _ = batch()
    torch.testing.assert_close(sae.encode(x).dense(), ((x - sae.b_dec) @ sae.W_dec.T).relu())


def test_matching_pursuit_residual_shrinks_by_its_coefficients() -> None:
    """|r_t|^2 - |r_(t+1)|^2 = c^2 and r_(t+1) is orthogonal to the atom just used, for unit-norm atoms."""
    sae = build("matching_pursuit", D_IN, D_SAE, n_steps=12).double().eval()
    assert isinstance(sae, MatchingPursuit)
    sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    x, _ = batch()
    before, dense = (x - sae.b_dec), torch.zeros(N, D_SAE, dtype=torch.float64)
    for steps in range(1, 13):
        code = sae.encode(x, n_steps=steps).dense()
        taken = code - dense
        residual = x - sae.b_dec - code @ sae.W_dec
        torch.testing.assert_close(
            before.square().sum(1) - residual.square().sum(1), taken.square().sum(1), rtol=1e-9, atol=1e-9
        )
        atoms = (taken.abs() > 1e-12).double() @ sae.W_dec
        torch.testing.assert_close((residual * atoms).sum(1), torch.zeros(N, dtype=torch.float64), atol=1e-9, rtol=0)
        before, dense = residual, code


def naive_pursuit(sae: MatchingPursuit, x: Tensor) -> Tensor:
    """The loop as written in the paper, dense, left to autograd."""
    residual, z = x - sae.b_dec, torch.zeros(x.shape[0], sae.d_sae, dtype=x.dtype)
    for _ in range(sae.n_steps):
        scores = residual @ sae.W_dec.T
        one_hot = torch.nn.functional.one_hot(scores.argmax(dim=1), sae.d_sae).to(x.dtype)
        chosen = scores.relu() * one_hot
        z, residual = z + chosen, residual - chosen @ sae.W_dec
    return z


@pytest.mark.parametrize("n_steps", [1, 5, 20])
def test_matching_pursuit_gradient_runs_through_the_residuals(n_steps: int) -> None:
    sae = build("matching_pursuit", D_IN, D_SAE, n_steps=n_steps).double()
    assert isinstance(sae, MatchingPursuit)
    with torch.no_grad():
        sae.W_dec.mul_(0.8 + 0.4 * torch.rand(D_SAE, 1))  # free norms; atoms are taken more than once
        sae.b_dec.normal_()
    x, _ = batch()
    x.requires_grad_()
    target = torch.randn(N, D_IN, dtype=torch.float64)
    code = sae.encode(x)
    if n_steps > 5:
        assert (code.counts() < n_steps).any(), "no atom was taken twice"
    (sae.decode(code) - target).square().sum().backward()
    found = [p.grad.clone() for p in (sae.W_dec, sae.b_dec, x)]
    sae.zero_grad()
    x.grad = None
    z = naive_pursuit(sae, x)
    torch.testing.assert_close(code.dense(), z)
    (z @ sae.W_dec + sae.b_dec - target).square().sum().backward()
    for ours, naive in zip(found, (sae.W_dec.grad, sae.b_dec.grad, x.grad)):
        torch.testing.assert_close(ours, naive)


class NaiveJump(torch.autograd.Function):
    """JumpReLU and its straight-through estimator on dense pre-activations."""

    @staticmethod
    def forward(ctx, u, theta, eps):
        ctx.save_for_backward(u, theta)
        ctx.eps = eps
        return u * (u > theta)

    @staticmethod
    def backward(ctx, grad):
        u, theta = ctx.saved_tensors
        kernel = ((u - theta) / ctx.eps).abs() < 0.5
        return grad * (u > theta), (-(theta / ctx.eps) * kernel * grad).sum(0), None


class NaiveStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, theta, eps):
        ctx.save_for_backward(u, theta)
        ctx.eps = eps
        return (u > theta).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        u, theta = ctx.saved_tensors
        kernel = ((u - theta) / ctx.eps).abs() < 0.5
        return None, (-(1 / ctx.eps) * kernel * grad).sum(0), None


@pytest.mark.parametrize("penalty", ["l0", "target"])
@pytest.mark.parametrize("subtract", [True, False])
def test_jump_relu_gradients(penalty: str, subtract: bool) -> None:
    options = {"penalty": penalty, "bandwidth": 0.6, "target_l0": 3.0, "penalty_weight": 0.7}
    sae = build("jump_relu", D_IN, D_SAE, apply_b_dec_to_input=subtract, **options).double()
    assert isinstance(sae, JumpReLU)
    with torch.no_grad():
        sae.threshold.copy_(0.5 * torch.rand(D_SAE))  # some below half the bandwidth
        sae.b_enc.normal_(0, 0.3)
        sae.b_dec.normal_(0, 0.3)
    sae.ramp.fill_(1.0)
    x, _ = batch()
    code = sae.train().encode(x)
    loss, recon = sae.reconstruction_loss(x, code)
    (loss + sum(sae.extra_losses(x, code, x - recon).values())).backward()
    found = {key: p.grad.clone() for key, p in sae.named_parameters()}
    sae.zero_grad()
    u = (x - sae.b_dec if subtract else x) @ sae.W_enc + sae.b_enc
    acts = NaiveJump.apply(u, sae.threshold, 0.6)
    l0 = NaiveStep.apply(u, sae.threshold, 0.6).sum() / N
    cost = l0 if penalty == "l0" else (l0 / 3.0 - 1) ** 2
    ((x - acts @ sae.W_dec - sae.b_dec).square().sum() + 0.7 * cost).backward()
    torch.testing.assert_close(code.dense(), acts)
    for key, parameter in sae.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, msg=lambda m, key=key: f"{key}: {m}")


def test_gated_gradients() -> None:
    sae = build("gated", D_IN, D_SAE, l1=0.3).double().train()
    with torch.no_grad():
        for key in ("b_enc", "r_mag", "b_mag", "b_dec"):
            getattr(sae, key).normal_(0, 0.5)  # magnitudes of both signs behind open gates
    sae.ramp.fill_(1.0)
    x, _ = batch()
    code = sae.encode(x)
    loss, recon = sae.reconstruction_loss(x, code)
    (loss + sum(sae.extra_losses(x, code, x - recon).values())).backward()
    found = {key: p.grad.clone() for key, p in sae.named_parameters()}
    sae.zero_grad()
    h = (x - sae.b_dec) @ sae.W_enc
    gate = h + sae.b_enc
    acts = (gate > 0) * (sae.r_mag.exp() * h + sae.b_mag).relu()
    from_gate = gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    objective = (x - acts @ sae.W_dec - sae.b_dec).square().sum()
    (objective + 0.3 * gate.relu().sum(1).mean() + (x - from_gate).square().sum(1).mean()).backward()
    torch.testing.assert_close(code.dense(), acts)
    for key, parameter in sae.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("prefix_loss", ["mean", "sum"])
def test_matryoshka_gradients(prefix_loss: str) -> None:
    sae = build("matryoshka", D_IN, D_SAE, k=4, groups=(0.2, 0.2, 0.6), prefix_loss=prefix_loss).double().train()
    x, _ = batch()
    code = sae.encode(x)
    sae.reconstruction_loss(x, code)[0].backward()
    found = {key: p.grad.clone() for key, p in sae.named_parameters()}
    sae.zero_grad()
    acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * (code.dense() != 0)
    ends = [0, 3, 6, 15] if prefix_loss == "mean" else [3, 6, 15]
    errors = [(x - acts[:, :m] @ sae.W_dec[:m] - sae.b_dec).square().sum() for m in ends]
    (sum(errors) / (len(ends) if prefix_loss == "mean" else 1)).backward()
    for key, parameter in sae.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, msg=lambda m, key=key: f"{key}: {m}")


def test_revival_draws_silent_atoms_towards_the_residual() -> None:
    sae = build("matching_pursuit", D_IN, 30, n_steps=1)
    assert isinstance(sae, MatchingPursuit)
    x = torch.randn(5, D_IN)  # five tokens with one atom each: at least 25 atoms are silent
    code = sae.encode(x)
    error = torch.randn(5, D_IN)
    sae.extra_losses(x, code, error)["revive"].backward()
    silent = ~code.fired()
    assert sae.W_dec.grad is not None
    expected = -1e-2 * error.mean(0) / silent.sum()
    torch.testing.assert_close(sae.W_dec.grad[silent], expected.expand(int(silent.sum()), -1))
    assert (sae.W_dec.grad[~silent] == 0).all()
    everything = SparseCode.from_dense(torch.ones(5, 30))
    assert sae.extra_losses(x, everything, error) == {}


@pytest.mark.parametrize(("norm", "norms"), [("free", (2, 0.5)), ("ball", (1, 0.5)), ("renormalise", (1, 1))])
def test_matching_pursuit_norms(norm: str, norms: tuple[float, float]) -> None:
    sae = build("matching_pursuit", 3, 2, n_steps=1, norm=norm)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[2.0, 0, 0], [0, 0.5, 0]]))
        sae.after_step(1, 10)
    assert sae.W_dec.norm(dim=1).tolist() == pytest.approx(norms)


def test_feature_choice_changes_phase() -> None:
    sae = build("feature_choice", D_IN, D_SAE, k=3, mutual_share=0.5, second_lr=0.3, second_warmup=0.1)
    assert isinstance(sae, FeatureChoice)
    rates = torch.rand(D_SAE, dtype=torch.float64).sort(descending=True).values
    sae.density.set_(rates * 3 / rates.sum())
    scales = []
    for step in range(1, 101):
        scales.append(sae.lr_scale(step - 1, 100))
        sae.after_step(step, 100)
    assert sae.switched == 50 and sae.rates.sum().item() == pytest.approx(3)
    assert (sae.rates.diff() <= 0).all(), "budgets follow the densities' ranks"
    assert scales[:50] == [1.0] * 50
    assert scales[50] == pytest.approx(0.3 / 11) and scales[60:] == [0.3] * 40
    fitted = sae.zipf.clone()
    sae.density.set_(torch.ones(D_SAE))
    sae.fit_law()
    assert torch.equal(sae.zipf, fitted), "the law is that of the first phase"


def test_adaptive_penalty_moves_towards_its_target() -> None:
    sae = build("relu", D_IN, D_SAE, target_l0=2.0, adapt_rate=0.1)
    for l0, expected in [(3, 1.1), (1, 1.0), (1, 1 / 1.1)]:
        acts = torch.zeros(4, D_SAE)
        acts[:, :l0] = 1
        sae.observe(torch.zeros(4, D_IN), SparseCode.from_dense(acts), None)
        assert sae.strength.item() == pytest.approx(expected)


def test_penalties_have_no_auxk_and_linear_variants_do() -> None:
    dead = torch.tensor([1])
    for name in ("relu", "gated", "jump_relu", "matching_pursuit"):
        assert build(name, D_IN, D_SAE).aux_latents(dead, 1.0) == {}
    assert set(build("topk", D_IN, D_SAE, k=2).aux_latents(dead, 1.0)) == {"auxk"}

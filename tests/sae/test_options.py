"""Options that the papers' own codes have: tanh penalty, random nested prefixes, matched norm at the start."""

from __future__ import annotations

import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import build
from saelab.sae.matryoshka import MEMORY
from saelab.training import TrainConfig, train_steps

D_IN, D_SAE, N = 10, 15, 40


def test_tanh_penalty_and_its_gradient() -> None:
    """Anthropic's penalty on active latents; the gradient passes to pre-activations above their threshold only."""
    sae = build("jump_relu", D_IN, D_SAE, penalty="tanh", penalty_weight=0.7, threshold=0.2, tanh_scale=3.0).double()
    sae.ramp.fill_(1.0)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    code = sae.train().encode(x)
    sae.extra_losses(x, code, x)["tanh_penalty"].backward()
    found = sae.W_enc.grad.clone()
    sae.zero_grad()
    u = x @ sae.W_enc + sae.b_enc
    (0.7 * torch.tanh(3.0 * u * (u > 0.2)).sum(1).mean()).backward()
    torch.testing.assert_close(found, sae.W_enc.grad)
    with pytest.raises(UserError, match="tanh_scale"):
        build("jump_relu", D_IN, D_SAE, tanh_scale=0.0)


def test_tanh_penalty_reaches_the_thresholds() -> None:
    """Pre-activations just below or above a threshold: raising it is worth what the penalty on them costs."""
    sae = build("jump_relu", 1, 1, penalty="tanh", threshold=1.0, bandwidth=0.5, tanh_scale=1.0)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
    sae.ramp.fill_(1.0)
    x = torch.tensor([[1.1], [3.0]])
    sae.extra_losses(x, sae.train().encode(x), x)["tanh_penalty"].backward()
    # One entry of two lies in the kernel: -theta / eps, times tanh' at 1.1, halved by the mean over tokens.
    expected = -(1.0 / 0.5) * (1 - torch.tanh(torch.tensor(1.1)) ** 2) / 2
    torch.testing.assert_close(sae.threshold.grad, expected[None])


def test_random_prefixes_are_those_of_the_order_of_contributions() -> None:
    sae = build("matryoshka", D_IN, D_SAE, k=4, prefix_loss="sum", random_prefixes=3).double().train()
    x = torch.randn(N, D_IN, dtype=torch.float64)
    code = sae.encode(x)
    torch.manual_seed(3)
    loss, recon = sae.reconstruction_loss(x, code)
    z = code.dense()
    contribution = (1 - MEMORY) * z.square().mean(0)
    torch.testing.assert_close(sae.contribution, contribution)
    torch.manual_seed(3)
    ends = sae._draw(code)[0].tolist()
    assert len(ends) == 4 and ends[-1] == D_SAE and ends == sorted(set(ends)) and ends[0] >= 1
    order = contribution.argsort(descending=True, stable=True)
    want = 0.0
    for end in ends:
        first = order[:end]
        want += (x - z[:, first] @ sae.W_dec[first] - sae.b_dec).square().sum()
    torch.testing.assert_close(loss, torch.as_tensor(want))
    torch.testing.assert_close(recon, z @ sae.W_dec + sae.b_dec)
    assert "contribution" not in build("matryoshka", D_IN, D_SAE, k=4).state_dict()
    with pytest.raises(UserError, match="random_prefixes"):
        build("matryoshka", D_IN, D_SAE, k=4, random_prefixes=D_SAE)


def test_random_prefixes_do_not_depend_on_what_was_drawn_before(tmp_path) -> None:
    """Two runs of one seed are the same, whatever the global generator did in between."""
    cache = ActivationCache.from_tensors(tmp_path / "c", torch.randn(300, D_IN), held_out=0.1)
    weights = []
    for shift in (0, 5):
        torch.manual_seed(1)
        sae = build("matryoshka", D_IN, D_SAE, k=4, random_prefixes=2)
        torch.rand(shift)
        for _ in train_steps(sae, cache, TrainConfig(epochs=2, batch_size=64)):
            pass
        weights.append(sae.W_dec.detach().clone())
    assert torch.equal(*weights)


def test_matched_norm_returns_what_came_in() -> None:
    """Output norm equals input norm on random directions about b_dec; the selection does not change."""
    x = torch.randn(200, 32)
    plain, matched = (build("topk", 32, 256, k=8, match_norm=flag) for flag in (False, True))
    with torch.no_grad():
        matched.load_state_dict(plain.state_dict())
    offset = torch.randn(32)
    for sae in (plain, matched):
        sae.initialise(x, offset)
    probes = torch.randn(4000, 32)
    probes = probes / probes.norm(dim=1, keepdim=True) + offset
    norms = [float((sae(probes) - sae.b_dec).detach().norm(dim=1).mean()) for sae in (plain, matched)]
    # 256 probes of the initialisation against 4000 others: a few per cent
    assert norms[1] == pytest.approx(1, abs=0.03)
    assert abs(norms[0] - 1) > 0.1
    torch.testing.assert_close(plain.encode(probes).indices, matched.encode(probes).indices)
    torch.testing.assert_close(matched.W_enc * norms[0] / norms[1], plain.W_enc, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("name", ["batch_topk", "feature_choice"])
def test_thresholds_do_not_see_held_out_rows(name: str, tmp_path) -> None:
    """Another held-out part leaves every weight and threshold as it is."""
    x = torch.randn(400, D_IN)
    states = []
    for factor in (1.0, 3.0):
        acts = torch.cat([x[:360], factor * x[360:]])
        cache = ActivationCache.from_tensors(tmp_path / f"{factor}", acts, held_out=0.1)
        torch.manual_seed(0)
        sae = build(name, D_IN, D_SAE, k=3)
        for _ in train_steps(sae, cache, TrainConfig(epochs=1, batch_size=64)):
            pass
        states.append(sae.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    kept = sae.encode(x[:360]).l0().double().mean()
    assert float(kept) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(
    ("variant", "option"),
    [
        ("jump_relu", {"penalty": "L0"}),
        ("gradient_topk", {"grad_select": "train"}),
        ("feature_choice", {"budgets": "equal"}),
        ("matching_pursuit", {"norm": "unit"}),
        ("matryoshka", {"prefix_loss": "average"}),
    ],
)
def test_a_word_that_is_no_choice_is_not_taken_for_another(variant: str, option: dict[str, str]) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(option))}='.*' is not one of \w+, \w+"):
        build(variant, d_in=8, d_sae=32, **option)

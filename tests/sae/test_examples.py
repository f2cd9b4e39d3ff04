"""One worked example per variant, on two tokens and three latents, with numbers to check by hand.

    directions d_0 = (1, 0), d_1 = (0, 1), d_2 = (0.6, 0.8); encoder = decoder, no biases
    tokens     x_0 = (3, 1), x_1 = (-1.5, 2)

so that the pre-activations are

    token 0:   3.0   1.0   2.6
    token 1:  -1.5   2.0   0.7
"""

from __future__ import annotations

import math

import pytest
import torch

from saelab.sae import SAE, VARIANTS, build
from saelab.sae.feature_choice import FeatureChoice
from saelab.sae.gated import GatedSAE
from saelab.sae.jump_relu import JumpReLU
from saelab.sae.threshold import BatchBudgetSAE

D = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
X = torch.tensor([[3.0, 1.0], [-1.5, 2.0]])


def example(name: str, **config) -> SAE:
    sae = build(name, d_in=2, d_sae=3, **config).train()
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key != "threshold":
                parameter.zero_()
        sae.W_dec.copy_(torch.tensor(D))
        if hasattr(sae, "W_enc"):
            sae.W_enc.copy_(torch.tensor(D).T)
    return sae


def assert_code(sae: SAE, expected: list[list], grads: torch.Tensor | None = None) -> None:
    torch.testing.assert_close(sae.encode(X, grads).dense(), torch.tensor(expected, dtype=torch.float32))


def test_topk() -> None:
    assert_code(example("topk", k=1), [[3, 0, 0], [0, 2, 0]])
    assert_code(example("topk", k=2), [[3, 0, 2.6], [0, 2, 0.7]])
    assert_code(example("topk", k=3), [[3, 1, 2.6], [0, 2, 0.7]])  # -1.5 is kept, then clipped


def test_abs_topk() -> None:
    assert_code(example("abs_topk", k=2), [[3, 0, 2.6], [-1.5, 2, 0]])
    assert_code(example("batch_topk", k=1, signed=True), [[3, 0, 2.6], [0, 0, 0]])
    sae = example("batch_topk", k=1, signed=True).eval()
    assert isinstance(sae, BatchBudgetSAE)
    sae.threshold.set_(torch.tensor(1.2))
    assert_code(sae, [[3, 0, 2.6], [-1.5, 2, 0]])


def test_batch_topk() -> None:
    sae = example("batch_topk", k=1)
    assert_code(sae, [[3, 0, 2.6], [0, 0, 0]])
    assert_code(example("batch_topk", k=2, signed=True), [[3, 0, 2.6], [-1.5, 2, 0]])
    assert isinstance(sae, BatchBudgetSAE)
    sae.observe(X, sae.encode(X), None)
    assert sae.threshold.mean().item() == pytest.approx(2.6)  # the smallest value kept
    assert_code(sae.eval(), [[3, 0, 0], [0, 0, 0]])  # strictly above 2.6
    sae.calibrate([X])
    assert sae.threshold.mean().item() == pytest.approx(2.3)  # between 2.6 and 2: one latent per token on average
    assert_code(sae, [[3, 0, 2.6], [0, 0, 0]])


def test_mutual_choice() -> None:
    assert_code(example("mutual_choice", k=1.5), [[3, 0, 2.6], [0, 2, 0]])  # three entries for two tokens


def test_feature_choice() -> None:
    sae = example("feature_choice", k=1.5, budgets="uniform", mutual_share=0.0)
    assert isinstance(sae, FeatureChoice)
    assert_code(sae, [[3, 0, 2.6], [0, 2, 0]])  # one token per latent
    sae.rates.copy_(torch.tensor([0.0, 1.0, 0.5]))
    assert_code(sae, [[0, 1, 2.6], [0, 2, 0]])  # budgets 0, 2, 1
    sae.rates.copy_(torch.tensor([1.0, 0.5, 0.0]))
    assert_code(sae, [[3, 0, 0], [0, 2, 0]])  # budgets 2, 1, 0; latent 0 must take token 1, where it is negative
    sae.observe(X, sae.encode(X), None)
    assert sae.realised.item() == pytest.approx(2 / 3)
    sae.calibrate([X])
    assert sae.latent_threshold.mean().tolist() == pytest.approx([0, 1.5, 2.6013])  # none; between 2 and 1; above all
    assert_code(sae.eval(), [[3, 0, 0], [0, 2, 0]])


def test_gradient_topk() -> None:
    grads = torch.tensor([[0.0, 3.0], [0.0, 0.0]])  # |W_dec g| of token 0: 0, 3, 2.4
    # Scores of token 0 with beta = 1: 3 * (1 + 0), 1 * (1 + 3), 2.6 * (1 + 2.4). The value kept is z.
    assert_code(example("gradient_topk", k=1, grad_norm="none"), [[0, 0, 2.6], [0, 2, 0]], grads)
    assert_code(example("gradient_topk", k=2, grad_norm="none"), [[0, 1, 2.6], [0, 2, 0.7]], grads)
    # The root mean square of |W_dec g| over both tokens is sqrt((0 + 9 + 5.76) / 6) = 1.568, and 2.4 / 1.568 = 1.53.
    assert_code(example("gradient_topk", k=1, beta=0.1), [[3, 0, 0], [0, 2, 0]], grads)  # 2.6 * 1.153 = 2.998 < 3
    assert_code(example("gradient_topk", k=1, beta=0.2), [[0, 0, 2.6], [0, 2, 0]], grads)  # 2.6 * 1.306 = 3.396 > 3
    assert_code(example("gradient_topk", k=2).eval(), [[3, 0, 2.6], [0, 2, 0.7]])  # no gradients at inference


def test_matching_pursuit() -> None:
    # Token 0: d_0 explains 3 and leaves (0, 1), which is d_1. Token 1: d_1 leaves (-1.5, 0): no positive product.
    assert_code(example("matching_pursuit", n_steps=2), [[3, 1, 0], [0, 2, 0]])
    assert_code(example("matching_pursuit", n_steps=1), [[3, 0, 0], [0, 2, 0]])
    assert_code(example("matching_pursuit", n_steps=2, residual_stop=1.2), [[3, 0, 0], [0, 2, 0]])  # |(0, 1)| < 1.2


def test_relu() -> None:
    assert_code(example("relu"), [[3, 1, 2.6], [0, 2, 0.7]])


def test_jump_relu() -> None:
    sae = example("jump_relu", threshold=1.0, bandwidth=1.0)
    assert_code(sae, [[3, 0, 2.6], [0, 2, 0]])  # 1.0 is not above 1
    assert isinstance(sae, JumpReLU)
    code = sae.encode(X)
    assert code.values.numel() == 5  # 1.0 and 0.7 lie within half a bandwidth below: stored zeros
    sae.decode(code).sum().backward()
    # d/dtheta = -theta / eps per entry within half a bandwidth, times the sum of its direction: d_1 and d_2.
    assert sae.threshold.grad is not None
    torch.testing.assert_close(sae.threshold.grad, torch.tensor([0, -1, -1.4]))


def test_gated() -> None:
    sae = example("gated")
    assert isinstance(sae, GatedSAE)
    with torch.no_grad():
        sae.b_enc.copy_(torch.tensor([-3.5, 0, 0]))  # closes the gate of latent 0, whatever its magnitude
        sae.r_mag.fill_(math.log(2))
        sae.b_mag.fill_(-1)
    assert_code(sae, [[0, 2 * 1 - 1, 2 * 2.6 - 1], [0, 2 * 2 - 1, 2 * 0.7 - 1]])
    terms = sae.extra_losses(X, sae.encode(X), X)
    # The gate is (0, 1, 2.6) and (0, 2, 0.7); its reconstructions (1.56, 3.08) and (0.42, 2.56) miss the tokens by
    # (1.44, -2.08) and (-1.92, -0.56).
    assert terms["gate"].item() == pytest.approx((1.44**2 + 2.08**2 + 1.92**2 + 0.56**2) / 2)
    sae.after_step(1, 1)
    l1 = sae.extra_losses(X, sae.encode(X), X)["l1"].item()
    assert l1 == pytest.approx(0.1 * (1 + 2.6 + 2 + 0.7) / 2)


@pytest.mark.parametrize(("prefix_loss", "expected"), [("mean", (16.25 + 7.25 + 9.85) / 3), ("sum", 7.25 + 9.85)])
def test_matryoshka(prefix_loss: str, expected: float) -> None:
    sae = example("matryoshka", k=1, groups=(1 / 3, 2 / 3), prefix_loss=prefix_loss)
    assert_code(sae, [[3, 0, 2.6], [0, 0, 0]])
    # Squared errors: of the offset alone 10 + 6.25, of the first latent 1 + 6.25, of all 1.56^2 + 1.08^2 + 6.25.
    loss, recon = sae.reconstruction_loss(X, sae.encode(X))
    assert loss.item() == pytest.approx(expected)
    torch.testing.assert_close(recon, torch.tensor([[4.56, 2.08], [0, 0]]))


def test_every_variant_has_an_example() -> None:
    named = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(VARIANTS) <= named

"""JumpReLU: a learned threshold per latent and an L0 penalty (Rajamanoharan et al., 2024, arXiv 2407.14435).

Threshold and penalty have no gradient; straight-through estimators with a rectangle kernel of width ``bandwidth``
stand in for it. Only pre-activations above ``threshold - bandwidth / 2`` contribute to any gradient, so the code in
training holds just those, the ones below the threshold as stored zeros. Bandwidth and initial threshold assume
activations of unit mean square norm, which the trainer's scaling provides up to a factor of two.

Latents need a direction before the penalty silences them, or they die. So the encoder begins as the decoder's transpose
times ``ENCODER_START``, where other variants have 1 (a step turns short vectors further), the penalty rises over three
tenths of the run and begins at ``PRESSURE_START`` of its weight where an ``l0`` is asked for, and the kernel is wider
than the paper's 0.001 (``python -m saelab.bench.encoder_start`` compares; docs/learning-rate.md has a table).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.kernels import SelectedPreActs
from saelab.sae.penalty import PenaltySAE
from saelab.sparse import SparseCode

ENCODER_START = 0.3
PRESSURE_START = 0.05


class JumpReLU(PenaltySAE, variant="jump_relu"):
    """``z = u * 1[u > threshold]``; minimises ``||x - recon||^2`` and a penalty on the number of active latents."""

    saelens = "jumprelu"
    scaled = (*PenaltySAE.scaled, "threshold", "bandwidth")
    only_if_set = ("tanh_scale", "l0")
    tunable = ("penalty", "target_l0", "penalty_weight", "penalty_warmup", "bandwidth", "tanh_scale", "l0")
    rate_factor = 0.75  # measured on two models and a planted world (docs/learning-rate.md)
    shift_above = 0.0  # moving thresholds leaves the values as they are
    bandwidth: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        penalty: Literal["target", "l0", "tanh"] = "target",
        target_l0: int | float = 32,
        penalty_weight: float = 1.0,
        penalty_warmup: float = 0.3,
        threshold: float = 0.001,
        bandwidth: float = 0.06,
        apply_b_dec_to_input: bool = True,
        tanh_scale: float = 4.0,
        l0: int | float | None = None,
        d_out: int | None = None,
        skip: bool = False,
    ) -> None:
        """
        Args:
            penalty: weight * (L0 / target_l0 - 1)^2 with the batch's mean L0, weight * L0 (the paper), or weight *
                sum_j tanh(tanh_scale * z_j), which also draws active latents down (Anthropic's, as SAELens has it;
                there times the norm of d_j, which is 1 here).
            target_l0: Active latents per token that the target penalty aims at.
            penalty_weight: Weight of the penalty, for activations of unit mean square norm.
            penalty_warmup: Share of the steps over which the penalty rises from 0; with l0, over which the L0 that is
                wanted falls to it.
            threshold: Initial threshold of every latent, for activations of unit mean square norm.
            bandwidth: Width of the kernel in the straight-through estimators, in the same unit.
            apply_b_dec_to_input: Subtract b_dec before encoding.
            tanh_scale: Slope of the tanh penalty at 0, for activations of unit mean square norm.
            l0: Active latents per token to end at. A controller sets the weight of L0 / l0 (of the tanh penalty, where
                that is chosen), which begins at a twentieth of penalty-weight, and at the end one number is added to
                all thresholds. Takes the place of penalty=target and target-l0.
            d_out: Width of the target, for an SAE that reconstructs another place than the one it reads.
            skip: Add an affine skip connection from the input to the target.
        """
        if not tanh_scale > 0:
            raise UserError(f"tanh_scale={tanh_scale} must be positive")
        super().__init__(d_in, d_sae, penalty_warmup, l0=l0, start=PRESSURE_START, d_out=d_out, skip=skip)
        self.penalty, self.target_l0, self.penalty_weight = penalty, target_l0, penalty_weight
        self.tanh_scale = tanh_scale
        with torch.no_grad():
            self.W_enc.mul_(ENCODER_START)
        self.threshold = nn.Parameter(torch.full((d_sae,), float(threshold)))
        self.register_buffer("bandwidth", torch.tensor(bandwidth, dtype=torch.float64))

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        if self.training:
            return self.select_above(x, self.threshold - self.bandwidth / 2)
        return self.select_above(x, self.threshold)

    def activate(self, pre_acts: Tensor, indices: Tensor) -> Tensor:
        return _Jump.apply(pre_acts, self.threshold[indices], self.bandwidth)  # pyright: ignore

    def scores(self, x: Tensor) -> Tensor:
        u = self.pre_acts(x, slice(0, self.d_sae))
        return (u - self.threshold)[u > 0]

    def shift_(self, cut: float) -> None:
        self.threshold.add_(cut).clamp_(min=0)

    def extra_losses(self, x: Tensor, code: SparseCode, error: Tensor) -> dict[str, Tensor]:
        weight = self.penalty_weight * self.pressure() / (1 if self.control is None else self.control.l0)
        if self.penalty == "tanh":
            cost = torch.tanh(self.tanh_scale * code.values).sum() / code.n
            return {"tanh_penalty": weight * cost}
        l0 = _Step.apply(self.threshold[code.indices], code.values.detach(), self.bandwidth).sum() / code.n  # pyright: ignore
        counted = self.penalty == "l0" or self.control is not None
        return {"l0_penalty": weight * (l0 if counted else (self.share.mean(l0) / self.target_l0 - 1).square())}

    @torch.no_grad()
    def after_step(self, step: int, n_steps: int) -> None:
        super().after_step(step, n_steps)
        self.threshold.clamp_(min=0)  # below zero it would be a step down, not a jump up

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        super().before_fine_tuning(scale)
        norms = self.take_norms()
        for parameter in (self.W_enc, self.b_enc, self.threshold):
            parameter.mul_(norms)
        self.bandwidth.fill_(self.config["bandwidth"] / scale)

    def inference_threshold(self) -> Tensor | None:
        return self.threshold.detach()

    def diagnostics(self) -> dict[str, float | Tensor]:
        return {**super().diagnostics(), "threshold": self.threshold.mean()}


class _Jump(torch.autograd.Function):
    """``u * 1[u > theta]``; ``d/du = 1[u > theta]``, ``d/dtheta = -theta / eps * 1[|u - theta| < eps / 2]``."""

    @staticmethod
    def forward(ctx, u, theta, eps):  # pyright: ignore
        ctx.save_for_backward(u, theta, eps)
        return torch.where(u > theta, u, 0.0)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        u, theta, eps = ctx.saved_tensors
        near = (u - theta).abs() < eps / 2
        return grad * (u > theta), -(theta / eps) * near * grad, None


class _Step(torch.autograd.Function):
    """``1[u > theta]``; ``d/dtheta = -1 / eps * 1[|u - theta| < eps / 2]``, nothing for ``u``.

    Takes code values: a stored zero is a pre-activation in the lower half of the kernel.
    """

    @staticmethod
    def forward(ctx, theta, values, eps):  # pyright: ignore
        ctx.save_for_backward(theta, values, eps)
        return (values != 0).to(theta.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        theta, values, eps = ctx.saved_tensors
        near = values - theta < eps / 2
        return -(near / eps) * grad, None, None

"""g-SAE: the k latents with the largest first-order effect on the model's loss (Olmo et al., 2024, arXiv 2411.10397).

The paper says: TopK, with ``beta * z * |W_dec g|`` added to the selection score, ``g`` the gradient of the language
model's loss at the SAE's input. The following could not be verified and are therefore options or our choices: the value
of beta, any normalisation of the gradient (the size of ``g`` depends on how the loss is reduced), whether gradients are
used at evaluation, and every training setting. Nothing here reproduces a number of that paper.

The gradient contains the label: with gradients at evaluation the selection has seen the next token, so the results are
an upper bound and not comparable with those of other SAEs.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from saelab import kernels
from saelab.devices import in_float64
from saelab.errors import UserError
from saelab.kernels import SelectedPreActs
from saelab.sae.base import Scores, check_share, progress
from saelab.sae.budget import BudgetSAE
from saelab.sae.threshold import RunningMean
from saelab.sparse import SparseCode


class GradientTopK(BudgetSAE, variant="gradient_topk"):
    """Keeps ``z = ReLU(u)`` on the k largest of ``z * (1 + beta * |W_dec g|)``; decodes ``z``, not the score."""

    saelens = "topk"
    needs_grads = True
    scaled = (*BudgetSAE.scaled, "gain.total")
    tunable = (*BudgetSAE.tunable, "beta_warmup")
    only_if_set = (*BudgetSAE.only_if_set, "beta_warmup")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int = 32,
        beta: float = 1.0,
        grad_norm: Literal["rms", "none"] = "rms",
        grad_select: Literal["train_only", "train_and_eval", "eval_only"] = "train_only",
        signed: bool = False,
        beta_warmup: float = 0.0,
        **options: Any,
    ) -> None:
        """
        Args:
            k: Latents per token.
            beta: Weight of the gradient term in the score; 0 is TopK, inf ranks by the gradient term alone.
            grad_norm: Divide |W_dec g| by its root mean square over batch and latents, so that beta has no unit.
            grad_select: When gradients take part in the selection; otherwise it is plain TopK.
            signed: Rank by |z| in place of ReLU(z) and keep the sign.
            beta_warmup: Share of the steps over which beta rises from 0; 0 trains with beta throughout.
        """
        if not beta >= 0:
            raise UserError(f"beta={beta} must be 0 or more")
        if math.isinf(beta) and beta_warmup:
            raise UserError(f"beta={beta} cannot rise from 0; leave beta_warmup at 0")
        super().__init__(d_in, d_sae, k, **options)
        self.beta, self.beta_warmup, self.signed = beta, check_share("beta_warmup", beta_warmup), signed
        self.beta_share = 1.0  # of beta, that its warm-up has reached
        self.grad_norm: Literal["rms", "none"] = grad_norm
        self.grad_select = grad_select
        if signed or grad_select != "train_only":
            self.saelens = "abstopk" if grad_select == "train_only" else None
        # The factor on |W_dec g| in eval mode, in units of activations because g is in inverse ones.
        self.gain = RunningMean()
        if grad_norm == "none":
            self.gain.set_(self.gain.total.new_ones(()))

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        if self.grad_select == ("eval_only" if self.training else "train_only"):
            return kernels.select_topk(x, self.W_enc, self.b_enc, self.b_in, round(self.budget), self.signed)
        if grads is None:
            raise UserError(f"grad_select={self.grad_select} needs gradients here; pass grads or use train_only")
        beta, grad_norm = self._beta(), self.grad_norm
        if self.training and grad_norm == "rms" and self.share.parts > 1 and math.isfinite(beta):
            known, gain = self._gain(grads)
            beta, grad_norm = beta * gain.where(known, 0.0).item(), "none"
        elif not self.training or grad_norm == "none":
            # In eval mode a mean over the batch would tie a token's code to its neighbours.
            beta, grad_norm = self._fixed_beta(), "none"
        return kernels.select_gradient_topk(
            x, grads, self.W_enc, self.b_enc, self.b_in, self.W_dec, round(self.budget), beta, grad_norm, self.signed
        )

    @property
    def selects_by_gradient(self) -> bool:
        return self.grad_select != "train_only"

    @torch.no_grad()
    def contest(self, x: Tensor, grads: Tensor | None = None) -> Scores:
        scores = super().contest(x, grads)
        if grads is None or not self.selects_by_gradient:
            return scores
        effect, beta = (grads[0] @ self.W_dec.T).abs(), self._fixed_beta()
        weight = effect if math.isinf(beta) else 1 + beta * effect
        name = f"{scores.name} × (1 + β |gradient along the latent|)"
        return scores._replace(score=scores.score * weight, name=name)

    def _beta(self) -> float:
        """Beta, or what its warm-up has reached in training."""
        return self.beta * self.beta_share if self.training and self.beta_share < 1 else self.beta

    def _fixed_beta(self) -> float:
        gain, beta = self.gain.mean().item(), self._beta()
        if gain == 0 and beta > 0:
            raise UserError("the scale of the gradients is measured in training; train this SAE first")
        return beta if math.isinf(beta) else beta * gain

    def schedule(self, step: int, n_steps: int) -> None:
        super().schedule(step, n_steps)
        self.beta_share = progress(self.beta_warmup, step, n_steps)

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        if grads is None or self.grad_norm == "none" or self.grad_select == "train_only":
            return
        known, gain = self._gain(grads)
        self.gain.update(gain, where=known)

    @torch.no_grad()
    def _gain(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the batch has a gradient along any latent, and one over the root mean square of these products."""
        # sum over tokens and latents of (g . d)^2 = <G^T G, W^T W>: no [n, d_sae] product.
        total = self.share.sum((in_float64(grads.T @ grads) * in_float64(self.W_dec.T @ self.W_dec)).sum())
        known = total > 0
        n = grads.shape[0] * self.share.parts
        return known, (n * self.d_sae / torch.where(known, total, 1.0)).sqrt()

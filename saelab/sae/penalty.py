"""Base classes of the baselines that are sparse because of a penalty in the loss, not of a budget."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.errors import UserError
from saelab.sae.base import LinearSAE, Scores
from saelab.sparse import SparseCode


class PenaltySAE(LinearSAE):
    """An SAE whose objective has a sparsity term; its weight rises from 0 over the first ``warmup`` share of the run.

    With a ``target_l0`` the weight is also multiplied by ``1 +- rate`` after each step, towards that number of active
    latents. Such SAEs have no AuxK loss. Early in training half of the latents are active on every token.
    """

    ramp: Tensor
    strength: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        warmup: float,
        adapt_to: int | float | None = None,
        rate: int | float = 0.0,
    ) -> None:
        super().__init__(d_in, d_sae)
        if not 0 <= warmup <= 1:
            raise UserError(f"penalty_warmup={warmup} is a share of the run; give a number from 0 to 1")
        self.warmup, self.adapt_to, self.rate = warmup, adapt_to, rate
        self.register_buffer("ramp", torch.tensor(0.0 if warmup else 1.0, dtype=torch.float64))
        self.register_buffer("strength", torch.tensor(1.0, dtype=torch.float64))

    def pressure(self) -> Tensor:
        """The current factor on the configured weight of the penalty."""
        return self.ramp * self.strength

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        if self.adapt_to is not None:
            l0 = (code.values != 0).sum() / code.n
            self.strength *= torch.where(l0 > self.adapt_to, 1 + self.rate, 1 / (1 + self.rate))

    def after_step(self, step: int, n_steps: int) -> None:
        if self.warmup:
            self.ramp.fill_(min(1.0, step / (self.warmup * n_steps)))

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        self.ramp.fill_(0.0 if self.warmup else 1.0)

    def aux_latents(self, dead: Int[Tensor, " m"], weight: float) -> dict[str, tuple[float, Tensor]]:
        return {}

    def contest(self, x: Tensor, grads: Tensor | None = None) -> Scores:
        scores = super().contest(x, grads)
        # Without a threshold every positive pre-activation is active.
        return scores if scores.cut is not None else scores._replace(cut=scores.score.new_zeros(()))

    def diagnostics(self) -> dict[str, float]:
        return {"pressure": self.pressure().item()}


class L1SAE(PenaltySAE):
    """A penalty SAE whose sparsity term is an L1 norm; the variant decides of what."""

    tunable = ("l1", "penalty_warmup", "target_l0", "adapt_rate")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1: float = 0.1,
        penalty_warmup: float = 0.1,
        target_l0: int | float | None = None,
        adapt_rate: float = 1e-3,
    ) -> None:
        """
        Args:
            l1: Weight of the L1 penalty (on the gate, where there is one), for activations of unit mean square norm.
            penalty_warmup: Share of the steps over which the penalty rises from 0.
            target_l0: Let the weight follow this number of active latents per token.
            adapt_rate: Relative change of the weight per step when it follows a target.
        """
        super().__init__(d_in, d_sae, penalty_warmup, target_l0, adapt_rate)
        self.l1 = l1

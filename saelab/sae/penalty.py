"""Base classes of the baselines that are sparse because of a penalty in the loss, not of a budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import UserError
from saelab.sae.base import Scores
from saelab.sae.controller import L0Controller, shift_to
from saelab.sae.linear import LinearSAE
from saelab.sae.threshold import calibration_sample
from saelab.sparse import SparseCode


class PenaltySAE(LinearSAE):
    """An SAE whose objective has a sparsity term; its weight rises from 0 over the first ``warmup`` share of the run.

    With ``l0`` a controller sets the weight instead (see :mod:`saelab.sae.controller`), so that training ends at that
    number of active latents per token, and :meth:`calibrate` makes it exact on a sample of training tokens, by one
    number that is subtracted from what decides whether a latent is active (:meth:`scores`). Older, and slower to get
    there, is ``target_l0``: the weight is multiplied by ``1 +- rate`` after each step. Such SAEs have no AuxK loss.
    Early in training half of the latents are active on every token.
    """

    l0_option = "l0"
    only_if_set = ("l0",)
    shift_above: float = 0.01  # relative error of the trained L0 from which on calibrate() mends it
    ramp: Tensor
    strength: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        warmup: float,
        adapt_to: int | float | None = None,
        rate: int | float = 0.0,
        l0: int | float | None = None,
        start: float = 1.0,
        d_out: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__(d_in, d_sae, d_out, skip)
        if not 0 <= warmup <= 1:
            raise UserError(f"penalty_warmup={warmup} is a share of the run; give a number from 0 to 1")
        self.warmup, self.adapt_to, self.rate = warmup, adapt_to, rate
        self.register_buffer("ramp", torch.tensor(0.0 if warmup else 1.0, dtype=torch.float64))
        self.register_buffer("strength", torch.tensor(1.0, dtype=torch.float64))
        if l0 is not None and adapt_to is not None:
            raise UserError(f"l0={l0} and target_l0={adapt_to} both set the weight of the penalty; leave target_l0 out")
        self.control = None if l0 is None else L0Controller(l0, d_sae, start)

    def pressure(self) -> Tensor:
        """The current factor on the configured weight of the penalty."""
        return self.ramp * self.strength if self.control is None else self.control.factor()

    def scores(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, " m"]:
        """What makes a latent active where it exceeds 0; for all latents that a shift could make active on a token."""
        return self.pre_acts(x, slice(0, self.d_sae)).flatten()

    def shift_(self, cut: float) -> None:
        """Make latents active whose score exceeds ``cut`` instead of 0."""
        self.b_enc.sub_(cut)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        x = None if self.control is None else calibration_sample(batches, self.d_in)
        if self.control is None or x is None:
            return
        shift, l0 = shift_to(self.control.l0, x, self.d_sae, self.scores), self.control.l0
        mend = abs(shift.before / l0 - 1) > self.shift_above
        if mend:
            self.shift_(shift.cut)
        self.control.trained.fill_(shift.before)
        self.control.reached.fill_(shift.after if mend else shift.before)

    def remarks(self) -> list[str]:
        return [] if self.control is None else self.control.remarks()

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        if self.control is not None:
            self.control.observe((code.values != 0).sum() / code.n)
        if self.adapt_to is not None:
            l0 = self.share.sum((code.values != 0).sum()) / (code.n * self.share.parts)
            self.strength *= torch.where(l0 > self.adapt_to, 1 + self.rate, 1 / (1 + self.rate))

    def after_step(self, step: int, n_steps: int) -> None:
        if self.warmup:
            self.ramp.fill_(min(1.0, step / (self.warmup * n_steps)))
        if self.control is not None:
            self.control.update(step, n_steps, self.warmup)

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        self.ramp.fill_(0.0 if self.warmup else 1.0)
        if self.control is not None:
            self.control.restart()

    def aux_latents(self, dead: Int[Tensor, " m"], weight: float) -> dict[str, tuple[float, Tensor]]:
        return {}

    def contest(self, x: Tensor, grads: Tensor | None = None) -> Scores:
        scores = super().contest(x, grads)
        # Without a threshold every positive pre-activation is active.
        return scores if scores.cut is not None else scores._replace(cut=scores.score.new_zeros(()))

    def diagnostics(self) -> dict[str, float | Tensor]:
        return {"pressure": self.pressure()}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.control is None:  # a fine-tuning may leave a controller behind
            for name in [name for name in state_dict if name.startswith(f"{prefix}control.")]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class L1SAE(PenaltySAE):
    """A penalty SAE whose sparsity term is an L1 norm; the variant decides of what."""

    tunable = ("l1", "penalty_warmup", "target_l0", "adapt_rate", "l0")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1: float = 0.1,
        penalty_warmup: float = 0.1,
        target_l0: int | float | None = None,
        adapt_rate: float = 1e-3,
        l0: int | float | None = None,
        d_out: int | None = None,
        skip: bool = False,
    ) -> None:
        """
        Args:
            l1: Weight of the L1 penalty (on the gate, where there is one), for activations of unit mean square norm.
            penalty_warmup: Share of the steps over which the penalty rises from 0; with l0, over which the L0 that is
                wanted falls to it.
            target_l0: Let the weight follow this number of active latents per token by adapt-rate; l0 is better at it.
            adapt_rate: Relative change of the weight per step when it follows target-l0.
            l0: Active latents per token to end at. A controller sets the weight, which begins at l1, and at the end one
                number is added to all biases (of the gate, where there is one) if L0 is more than 1 % off.
            d_out: Width of the target, for an SAE that reconstructs another place than the one it reads.
            skip: Add an affine skip connection from the input to the target.
        """
        super().__init__(d_in, d_sae, penalty_warmup, target_l0, adapt_rate, l0, d_out=d_out, skip=skip)
        self.l1 = l1

"""Matching pursuit: one latent at a time, chosen on the residual of those before (Costa et al., 2025, 2506.03093).

Encoder and decoder are one dictionary. Selection is by the largest signed product with the residual and coefficients
pass a ReLU, as in the authors' toy code. The gradient runs through all coefficients and the whole chain of residuals,
not through the argmax; the backward pass keeps no ``[n, d_sae]`` tensor. The official codes disagree on the norms of
the atoms, hence ``norm``; on the authors' synthetic benchmark only ``free`` recovers the planted atoms.

A token whose residual is within ``residual_stop`` from the start has an empty code; SAELens gives it one step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saelab import kernels
from saelab.errors import UserError
from saelab.sae.base import SAE, PursuitStep, unit_rows
from saelab.sae.inference import InferenceForm
from saelab.sparse import SparseCode

SILENT = 1e-2  # an atom whose largest value in a batch is below this did not take part
MANY = 10  # silent atoms from which revival starts


class MatchingPursuit(SAE, variant="matching_pursuit"):
    """``n_steps`` times: ``j = argmax d_j . r``, ``c = ReLU(d_j . r)``, ``z_j += c``, ``r -= c d_j``."""

    saelens = "matching_pursuit"
    l0_option = "n_steps"
    scaled = ("b_dec", "residual_stop")
    tunable = ("norm", "revive_weight")
    no_target = "its encoder and its decoder are one dictionary, which a target would need two of"

    residual_stop: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        n_steps: int = 32,
        residual_stop: float = 0.0,
        stop_on_repeat: bool = False,
        norm: Literal["free", "ball", "project", "renormalise"] = "free",
        revive_weight: float = 1e-2,
        use_b_dec: bool = True,
    ) -> None:
        """
        Args:
            n_steps: Steps per token; at most as many latents are active, fewer when an atom is taken again.
            residual_stop: A token stops once its residual's norm is below this, in units of the scaled activations.
            stop_on_repeat: A token stops once it has taken an atom for the second time.
            norm: Atoms after their start at unit norm: free, in the unit ball, or of unit norm with the gradient along
                them removed (project) or not (renormalise).
            revive_weight: Weight with which atoms silent in a batch are drawn towards the residual; 0 turns it off.
            use_b_dec: Subtract a learned offset first; without it the dictionary explains the mean as well.
        """
        if n_steps < 1:
            raise UserError(f"n_steps={n_steps} must be at least 1")
        if not residual_stop >= 0:
            raise UserError(f"residual_stop={residual_stop} must be 0 or more")
        super().__init__(d_in, d_sae)
        self.n_steps, self.stop_on_repeat = n_steps, stop_on_repeat
        self.norm, self.revive_weight, self.use_b_dec = norm, revive_weight, use_b_dec
        self.register_buffer("residual_stop", torch.tensor(residual_stop, dtype=torch.float64))
        self.b_dec.requires_grad_(use_b_dec)

    @property
    def b_in(self) -> Tensor | None:
        return self.b_dec if self.use_b_dec else None

    def encode(
        self,
        x: Tensor,
        grads: Tensor | None = None,
        *,
        n_steps: int | None = None,
        residual_stop: float | None = None,
    ) -> SparseCode:
        """See :meth:`SAE.encode`. ``n_steps`` and ``residual_stop`` may differ from those of training."""
        steps = self.n_steps if n_steps is None else n_steps
        stop = self.residual_stop.item() if residual_stop is None else residual_stop
        if not stop >= 0:
            raise UserError(f"residual_stop={stop} must be 0 or more")
        return SparseCode(*kernels.pursuit(x, self.W_dec, self.b_in, steps, stop, self.stop_on_repeat), self.d_sae)

    def extra_losses(self, x: Tensor, code: SparseCode, error: Tensor) -> dict[str, Tensor]:
        """Draw silent atoms towards the mean residual, once more than ten are (Overcomplete's recommendation)."""
        if not self.revive_weight:
            return {}
        peak = code.values.new_zeros(self.d_sae)
        peak.scatter_reduce_(0, code.indices, code.values.detach(), "amax")
        silent = self.share.sum((~(peak < SILENT)).int()) == 0  # in all of the batch
        if silent.sum() <= MANY:
            return {}
        return {"revive": -self.revive_weight * (self.W_dec[silent] @ error.mean(dim=0)).mean()}

    def initialise(self, x: Tensor, b_dec: Tensor) -> None:
        if self.use_b_dec:
            super().initialise(x, b_dec)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        if self.norm == "ball":
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1))
        elif self.norm != "free":
            self.W_dec.copy_(unit_rows(self.W_dec))

    def project_decoder_grad(self) -> None:
        if self.norm == "project":
            super().project_decoder_grad()

    def after_step(self, step: int, n_steps: int) -> None:
        if self.norm != "project":  # the constraint holds after every step, not only before the next one
            self.normalise_decoder()

    @torch.no_grad()
    def inference_form(self) -> InferenceForm:
        config = {
            "residual_threshold": self.residual_stop.item(),
            "max_iterations": self.n_steps,
            "stop_on_duplicate_support": self.stop_on_repeat,
            "apply_b_dec_to_input": self.use_b_dec,
        }
        return InferenceForm("matching_pursuit", {"W_dec": self.W_dec, "b_dec": self.b_dec}, config)

    @torch.no_grad()
    def replay(self, x: Tensor) -> tuple[list[PursuitStep], float]:
        """The steps of the pursuit on a token ``x [d_in]``, and the norm of the residual it starts from."""
        residual, stop = x.to(self.W_dec), self.residual_stop.item()
        if self.b_in is not None:
            residual = residual - self.b_in
        start, taken, made = float(residual.norm()), set(), []
        for _ in range(self.n_steps):
            if float(residual.norm()) <= stop:
                break
            best = (self.W_dec @ residual).topk(min(2, self.d_sae))
            latent, product = int(best.indices[0]), float(best.values[0])
            if product <= 0:
                break
            residual = residual - best.values[0] * self.W_dec[latent]
            second = (int(best.indices[1]), float(best.values[1])) if self.d_sae > 1 else (latent, product)
            made.append(PursuitStep(latent, product, float(residual.norm()), *second))
            if self.stop_on_repeat and latent in taken:
                break
            taken.add(latent)
        return made, start

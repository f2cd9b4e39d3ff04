"""Gated SAE: one half of the encoder decides which latents are active, the other how strongly (Rajamanoharan et al.,
2024, arXiv 2404.16014).

The two halves share their directions. The L1 penalty shrinks the gate only; an auxiliary reconstruction from the gate,
through a frozen decoder, gives the gate its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saelab import kernels
from saelab.kernels import SelectedPreActs
from saelab.sae.base import Scores
from saelab.sae.inference import InferenceForm
from saelab.sae.penalty import L1SAE
from saelab.sparse import SparseCode


class GatedSAE(L1SAE, variant="gated"):
    """``z = 1[gate > 0] * ReLU(exp(r_mag) * h + b_mag)`` with ``h = W_enc^T (x - b_dec)`` and ``gate = h + b_enc``."""

    saelens = "gated"
    scaled = (*L1SAE.scaled, "b_mag")

    def __init__(self, d_in: int, d_sae: int, **options: Any) -> None:
        super().__init__(d_in, d_sae, **options)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return self.select_above(x, 0.0)

    def activate(self, pre_acts: Tensor, indices: Tensor) -> Tensor:
        h = pre_acts - self.b_enc[indices]
        return (self.r_mag.exp()[indices] * h + self.b_mag[indices]).relu()

    def scores(self, x: Tensor) -> Tensor:
        gate = self.pre_acts(x, slice(0, self.d_sae))
        return gate[self.r_mag.exp() * (gate - self.b_enc) + self.b_mag > 0]

    def shift_biases_(self, shift: Tensor) -> None:
        super().shift_biases_(shift)
        self.b_mag.add_((self.r_mag.to(shift).exp() * shift).to(self.b_mag))

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        super().before_fine_tuning(scale)
        norms = self.take_norms()
        self.r_mag.add_(norms.log())
        self.b_mag.mul_(norms)

    def extra_losses(self, x: Tensor, code: SparseCode, error: Tensor) -> dict[str, Tensor]:
        """The L1 penalty on the gate, which the code was made of, and the reconstruction from it."""
        if code.pre_acts is None:
            raise ValueError("the code has no pre-activations; pass what encode returned")
        gate = code.pre_acts
        frozen = self.W_dec.detach(), self.b_dec.detach()
        wanted = x if not self.transcodes else error + self.decode(code).detach()
        from_gate, _ = kernels.sse(wanted, gate, code.indices, code.row_ptr, *frozen)
        return {"l1": self.l1 * self.pressure() * gate.sum() / code.n, "gate": from_gate.mean()}

    def contest(self, x: Tensor, grads: Tensor | None = None) -> Scores:
        return super().contest(x, grads)._replace(name="pre-activation of the gate")

    @torch.no_grad()
    def inference_form(self) -> InferenceForm | None:
        form = super().inference_form()
        assert form is not None
        gate = {name: value for name, value in form.tensors.items() if name != "b_enc"}
        tensors = {**gate, "b_gate": self.b_enc, "r_mag": self.r_mag, "b_mag": self.b_mag}
        return InferenceForm(form.architecture, tensors, form.config, form.d_out)

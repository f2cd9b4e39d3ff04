"""Training losses as pure functions of a batch; formulas in the docstrings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab import kernels
from saelab.sae import LinearSAE


def fvu(x: Float[Tensor, "n d_in"], recon: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained, ``sum ||x - recon||^2 / sum ||x - mean(x)||^2``: 0 is perfect.

    The mean is taken over this batch, so compare only values from equal batch sizes; predicting the batch mean
    scores 1.
    """
    return (x - recon).square().sum() / (x - x.mean(dim=0)).square().sum()


@dataclass(frozen=True)
class Subset:
    """The weights of some latents, one row each, for a loss on these alone.

    As copies (:meth:`copied`) they have gradients of their own, which :meth:`add_gradients` adds to those of the SAE:
    the loss then needs no gradient as large as the dictionary.
    """

    latents: Int[Tensor, " m"]
    W_enc: Float[Tensor, "m d_in"]
    b_enc: Float[Tensor, " m"]
    W_dec: Float[Tensor, "m d_out"]
    active: Bool[Tensor, " m"] | None = None  # which of them take part; None means all

    @classmethod
    def of(cls, sae: LinearSAE, latents: Int[Tensor, " m"], active: Tensor | None = None) -> Subset:
        """Rows gathered from ``sae``; gradients reach its parameters."""
        return cls(latents, sae.W_enc.T[latents], sae.b_enc[latents], sae.W_dec[latents], active)

    @classmethod
    def copied(cls, sae: LinearSAE, latents: Int[Tensor, " m"], active: Tensor | None = None) -> Subset:
        """Copies of the rows; gradients stay with them until :meth:`add_gradients`."""
        whole = sae.W_enc.detach().T, sae.b_enc.detach(), sae.W_dec.detach()
        W_enc, b_enc, W_dec = (part.index_select(0, latents).requires_grad_() for part in whole)
        return cls(latents, W_enc, b_enc, W_dec, active)

    @torch.no_grad()
    def add_gradients(self, sae: LinearSAE) -> None:
        """Add the gradients of the copies to those of ``sae``."""
        for parameter, rows in ((sae.W_enc, self.W_enc), (sae.b_enc, self.b_enc), (sae.W_dec, self.W_dec)):
            if rows.grad is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                by_latent = parameter.grad.T if parameter is sae.W_enc else parameter.grad
                by_latent.index_add_(0, self.latents, rows.grad)  # a latent occurs once: the order cannot matter


def auxk(
    sae: LinearSAE,
    x: Float[Tensor, "n d_in"],
    error: Float[Tensor, "n d_out"],
    latents: Int[Tensor, " m"] | Subset,
    k_aux: int,
    through: bool = False,
) -> Float[Tensor, ""]:
    """How much of the residual the given latents could explain (AuxK; Gao et al., 2024, appendix A.2).

    ``sum ||e - e_hat||^2 / sum ||e - mean(e)||^2`` with ``e = stop_grad(x - recon)`` and ``e_hat`` the decoding,
    without bias, of the ``k_aux`` largest pre-activations (magnitudes for signed SAEs) among ``latents``. Only their
    pre-activations are computed. A residual of zero gives 0, and so do latents of which none is active.

    With ``through`` the gradient passes the rectifier of the chosen latents as if it were not there: a latent whose
    pre-activations are all negative can then come back. In the paper's form it has no gradient.
    """
    rows, error = latents if isinstance(latents, Subset) else Subset.of(sae, latents), error.detach()
    # b_dec gets no gradient from this loss.
    centred = x if sae.b_in is None else x - sae.b_in.detach()
    k = min(k_aux, rows.latents.numel())
    squares = kernels.explain(centred, error, rows.W_enc, rows.b_enc, rows.W_dec, k, sae.signed, rows.active, through)
    loss = relative(squares, (error - error.mean(dim=0)).square().sum())
    return loss if rows.active is None else torch.where(rows.active.any(), loss, 0.0)


def relative(squares: Float[Tensor, ""], spread: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """``squares / spread``, and 0 where there is no spread to explain; NaN of the weights stays NaN."""
    return torch.where(spread > 0, squares / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0 * squares)


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "n d_in"], max_steps: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d_in"]:
    """The point with the smallest sum of distances to the rows of ``x`` (Weiszfeld's iteration from the mean).

    ``tolerance`` is relative to the root-mean-square norm of the rows.
    """
    median = x.mean(dim=0)
    unit = x.square().sum(dim=1).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(max_steps):
        weight = 1.0 / (x - median).norm(dim=1).clamp_min(1e-8 * unit)
        new = (weight @ x) / weight.sum()
        moved = (new - median).norm()
        median = new
        if moved < tolerance * unit:
            break
    return median

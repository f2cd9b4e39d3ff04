"""Training losses as pure functions of a batch; formulas in the docstrings."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import kernels
from saelab.sae import LinearSAE


def fvu(x: Float[Tensor, "n d_in"], recon: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained, ``sum ||x - recon||^2 / sum ||x - mean(x)||^2``: 0 is perfect.

    The mean is taken over this batch, so compare only values from equal batch sizes; predicting the batch mean
    scores 1.
    """
    return (x - recon).square().sum() / (x - x.mean(dim=0)).square().sum()


def auxk(
    sae: LinearSAE,
    x: Float[Tensor, "n d_in"],
    error: Float[Tensor, "n d_in"],
    latents: Int[Tensor, " m"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """How much of the residual the given latents could explain (AuxK; Gao et al., 2024, appendix A.2).

    ``sum ||e - e_hat||^2 / sum ||e - mean(e)||^2`` with ``e = stop_grad(x - recon)`` and ``e_hat`` the decoding,
    without bias, of the ``k_aux`` largest pre-activations (magnitudes for signed SAEs) among ``latents``. Only their
    pre-activations are computed. A residual of zero gives 0.
    """
    error = error.detach()
    W_enc = sae.W_enc.T[latents].T  # gathered by row of the transposed view: contiguous per latent
    b_enc = sae.b_enc[latents]
    k = min(k_aux, latents.numel())
    # b_dec gets no gradient from this loss.
    b_in = None if sae.b_in is None else sae.b_in.detach()
    selected = kernels.select_topk(x, W_enc.detach(), b_enc.detach(), b_in, k, sae.signed)
    values = kernels.pre_acts_at(x, W_enc, b_enc, b_in, selected)
    recon = kernels.decode(values, selected.indices, selected.row_ptr, sae.W_dec[latents], None)
    return relative((recon - error).square().sum(), (error - error.mean(dim=0)).square().sum())


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

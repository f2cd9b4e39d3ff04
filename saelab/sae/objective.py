"""A training batch's code, error and reconstruction, by the shortest way that the variant allows."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab import kernels
from saelab.sae.base import SAE
from saelab.sae.linear import LinearSAE
from saelab.sparse import SparseCode


def represent(
    sae: SAE, x: Tensor, grads: Tensor | None, sums: kernels.RowSums | None = None, target: Tensor | None = None
) -> tuple[SparseCode, Tensor, Tensor]:
    """The code, the objective's first term, and what was decoded, without gradient.

    ``target`` is what a transcoder's latents shall write (:meth:`saelab.sae.SAE.to_decode`).
    Where the values of the code are the pre-activations and the objective is the squared error, both matrices get their
    gradients in one pass. The gradient passes fill ``sums`` where the backend does so on the way.
    """
    wanted = x if target is None else target
    if not isinstance(sae, LinearSAE) or not plain(sae):
        code = sae.encode(x, grads)
        if code.by is not None:
            code.by.sums = sums
        return code, *sae.reconstruction_loss(wanted, code)
    with torch.no_grad():
        selected = sae.select(x, grads)
    by = kernels.ByLatent(*selected[1:], sae.d_sae)
    encoder, decoder = (sae.W_enc, sae.b_enc, sae.b_in), (sae.W_dec, sae.b_dec)
    per_token, recon, values = kernels.reconstruct(x, encoder, decoder, selected, by, sums, target)
    return SparseCode(values, *selected[1:], sae.d_sae, by), per_token.sum(), recon


def plain(sae: LinearSAE) -> bool:
    """Whether nothing lies between the pre-activations and the squared error that the variant redefines."""
    own = {
        name: getattr(getattr(sae, name), "__func__", None) for name in ("activate", "reconstruction_loss", "decode")
    }
    return own == {"activate": LinearSAE.activate, "reconstruction_loss": SAE.reconstruction_loss, "decode": SAE.decode}

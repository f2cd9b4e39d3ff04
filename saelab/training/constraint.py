"""The constraint on the decoder and the norm of the gradient, with as few passes over the parameters as possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saelab import kernels
from saelab.devices import in_float64
from saelab.distributed import Parallel
from saelab.distributed.sharding import REPLICATED
from saelab.losses import Subset
from saelab.sae import SAE, LinearSAE
from saelab.sae.objective import plain

PASSED = ("W_enc", "b_enc", "W_dec")  # what one gradient pass covers


def constrains_on_the_way(sae: SAE, parallel: Parallel) -> bool:
    """Whether the gradient pass may also project and measure: nothing is added to its results afterwards but AuxK."""
    if parallel.size > 1 or not isinstance(sae, LinearSAE) or not plain(sae) or kernels.backend(sae.W_dec) != "triton":
        return False
    if sae.d_out != sae.d_in or sae.W_skip is not None:  # two passes; a gradient that the sums lack
        return False
    own = {"normalise_decoder": SAE.normalise_decoder, "project_decoder_grad": SAE.project_decoder_grad}
    return all(getattr(getattr(sae, name), "__func__", None) is method for name, method in own.items())


def constrain(sae: SAE, rows: Sequence[Subset], sums: kernels.RowSums | None) -> dict[Tensor, Tensor] | None:
    """Finish the gradient: AuxK's rows, unit rows, no gradient along them.

    Returns factors that the optimizer must multiply the rows of a parameter by before its step, where the decoder has
    not been normalised here.
    """
    if sums is not None and sums.squares is not None and sums.scale is not None:
        _add_measured(sae, rows, sums.squares, sums.scale)
        return {sae.W_dec: sums.scale}
    for subset in rows:
        assert isinstance(sae, LinearSAE)
        subset.add_gradients(sae)
    sae.normalise_decoder()
    sae.project_decoder_grad()
    return None


@torch.no_grad()
def _add_measured(sae: SAE, rows: Sequence[Subset], squares: Tensor, scale: Tensor) -> None:
    """Project and add AuxK's rows where the gradient pass has projected already, and measure the sums."""
    assert isinstance(sae, LinearSAE)
    for subset in rows:
        latents = subset.latents
        if subset.W_dec.grad is not None:
            unit = subset.W_dec.detach() * scale[latents, None]
            along = (subset.W_dec.grad * unit).sum(1, keepdim=True)
            subset.W_dec.grad.addcmul_(along, unit, value=-1.0)
        subset.add_gradients(sae)
        grads = sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad
        assert grads[0] is not None and grads[1] is not None and grads[2] is not None
        found = (grads[0].T[latents], grads[2][latents], grads[1][latents, None])
        squares.index_copy_(0, latents, sum(part.square().sum(1) for part in found))  # pyright: ignore


@torch.no_grad()
def gradient_norm(sae: SAE, sums: kernels.RowSums | None) -> Tensor:
    """The norm of the gradient of one process, from the sums of the gradient pass where there are some."""
    if sums is not None and sums.squares is not None:
        rest = [p.grad for name, p in sae.named_parameters() if name not in PASSED and p.grad is not None]
        return (sums.squares.sum() + sum(grad.square().sum() for grad in rest)).sqrt()
    return torch.nn.utils.get_total_norm([p.grad for p in sae.parameters() if p.grad is not None])


@torch.no_grad()
def squared_gradients(sae: SAE, shared: bool) -> Tensor:
    """The squared norm of the gradient of what this process holds of the parameters that dictionary ranks share, or of
    the other ones; a number in float64."""
    named = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None and p.grad.numel()}
    norm = torch.nn.utils.get_total_norm([grad for name, grad in named.items() if (name in REPLICATED) == shared])
    return in_float64(norm.to(sae.device)).square()


def clip_factor(norm: Tensor, most: float | None, on_device: bool) -> Tensor | None:
    """What the gradient is multiplied by so that its norm is at most ``most``; None where it stays as it is.

    Where numbers stay on the device it is computed in any case.
    """
    if most is None or not (on_device or norm > most):
        return None
    return (most / (norm + 1e-6)).clamp(max=1.0)

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


def constrains_on_the_way(sae: SAE, parallel: Parallel) -> bool:
    """Whether the gradient passes may also project and measure; :func:`measured` says whether they have."""
    if parallel.size > 1 or not isinstance(sae, LinearSAE) or kernels.backend(sae.W_dec) != "triton":
        return False
    if sae.d_out != sae.d_in or sae.W_skip is not None:  # two passes; a gradient that the sums lack
        return False
    own = ("normalise_decoder", "project_decoder_grad", "decode")
    return all(getattr(getattr(sae, name), "__func__", None) is getattr(SAE, name) for name in own)


def measured(sae: SAE, sums: kernels.RowSums | None) -> bool:
    """Whether the gradient passes have projected and measured, and nothing has been added to their results."""
    if sums is None or sums.scale is None or not {"W_enc", "W_dec"} <= sums.passes.keys():
        return False
    return all(sums.holds(name, getattr(sae, name).grad) for name in sums.passes)


def constrain(sae: SAE, rows: Sequence[Subset], sums: kernels.RowSums | None) -> dict[Tensor, Tensor] | None:
    """Finish the gradient: AuxK's rows, unit rows, no gradient along them.

    Returns factors that the optimizer must multiply the rows of a parameter by before its step, where the decoder has
    not been normalised here.
    """
    if sums is not None and measured(sae, sums):
        assert sums.scale is not None
        _add_measured(sae, rows, sums)
        return {sae.W_dec: sums.scale}
    if sums is not None:
        sums.squares = None  # not those of the whole gradient
    for subset in rows:
        assert isinstance(sae, LinearSAE)
        subset.add_gradients(sae)
    sae.normalise_decoder()
    sae.project_decoder_grad()
    return None


@torch.no_grad()
def _add_measured(sae: SAE, rows: Sequence[Subset], sums: kernels.RowSums) -> None:
    """Project and add AuxK's rows where the gradient pass has projected already, and measure the sums."""
    assert isinstance(sae, LinearSAE) and sums.scale is not None and sums.squares is not None
    for subset in rows:
        latents = subset.latents
        if subset.W_dec.grad is not None:
            unit = subset.W_dec.detach() * sums.scale[latents, None]
            along = (subset.W_dec.grad * unit).sum(1, keepdim=True)
            subset.W_dec.grad.addcmul_(along, unit, value=-1.0)
        subset.add_gradients(sae)
        by_latent = {"W_enc": sae.W_enc.grad.T, "W_dec": sae.W_dec.grad, "b_enc": sae.b_enc.grad[:, None]}  # pyright: ignore
        found = sum(by_latent[name][latents].square().sum(1) for name in sums.passes)
        sums.squares.index_copy_(0, latents, found)  # pyright: ignore


@torch.no_grad()
def gradient_norm(sae: SAE, sums: kernels.RowSums | None) -> Tensor:
    """The norm of the gradient of one process, from the sums of the gradient pass where there are some."""
    if sums is not None and sums.squares is not None:
        return (sums.squares.sum() + sum(grad.square().sum() for grad in unmeasured(sae, sums))).sqrt()
    return torch.nn.utils.get_total_norm([p.grad for p in sae.parameters() if p.grad is not None])


def unmeasured(sae: SAE, sums: kernels.RowSums) -> list[Tensor]:
    """The gradients that the sums lack."""
    return [p.grad for name, p in sae.named_parameters() if name not in sums.passes and p.grad is not None]


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

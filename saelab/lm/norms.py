"""Norms in a model: their gain and offset, found by probing the module, and their output without these."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.structure import blocks, children, inside

BARE = "ln2.hook_normalized"  # a block's point behind the norm that its MLP reads, before the norm's gain


class NormParts(NamedTuple):
    """``norm(x) = scale(x) * weight * (x - mean) + bias``; the mean is subtracted where ``centred``."""

    weight: Tensor
    bias: Tensor
    centred: bool


@torch.no_grad()
def norm_parts(norm: nn.Module, like: Float[Tensor, "... d"]) -> NormParts:
    """Weight and bias of a norm, and whether it subtracts the mean, found by probing a copy of it."""
    width = like.shape[-1]
    norm = copy.deepcopy(norm)
    norm._forward_hooks.clear()  # those of this pass come along
    norm._forward_pre_hooks.clear()
    norm.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    x = torch.ones(width, device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
    x[1::2] = -1.0  # of mean 0 and root mean square 1, no entry 0
    if width % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0]) * 0.5**0.5
    up, down = norm(x[None])[0], norm(-x[None])[0]
    weight, bias = (up - down) / (2 * x), (up + down) / 2
    shifted = norm(x[None] + 1)[0] - bias
    centred = (shifted - weight * x).norm() < (shifted - weight * (x + 1) / 2**0.5).norm()
    return NormParts(weight, bias, bool(centred))


def bare_norm(model: nn.Module, index: int) -> str | None:
    """The path of the norm that the MLP of block ``index`` reads; None where the block's names do not tell it."""
    prefix, layers = blocks(model)
    names = children(layers[index]) if index < len(layers) else {}
    before = "pre_feedforward_layernorm"  # Gemma 2 and 3, whose other norm stands behind the attention
    if before not in names and "post_feedforward_layernorm" not in names:
        before = "post_attention_layernorm"
    return f"{prefix}.{index}.{before}" if before in names else None


def without_gain(norm: nn.Module, output: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """The output of a norm as it was before its gain; differentiable, in float32 at least.

    UserError for a norm whose weights are elsewhere, or that drops a dimension.
    """
    norm = inside(norm)
    if any(parameter.is_meta for parameter in norm.parameters()):
        raise UserError(
            f"{BARE} divides by a norm's gain, which an offloaded model does not hold; load the model whole"
        )
    parts = norm_parts(norm, output)
    if not bool(parts.weight.all()):
        raise UserError(f"{BARE} cannot be read: the norm has a gain of 0; choose mlp.hook_in")
    return (output.to(parts.weight) - parts.bias) / parts.weight

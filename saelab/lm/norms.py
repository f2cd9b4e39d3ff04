"""Norms in a model: their gain and offset, found by probing the module, and their output without these."""

from __future__ import annotations

import copy
from typing import NamedTuple
from weakref import WeakKeyDictionary

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


class _Probed(NamedTuple):
    """What probing a norm gave, for which device, precision and width, and the weights that it had then."""

    kind: tuple[torch.device, torch.dtype, int]
    weights: list[Tensor]
    parts: NormParts


# A probe costs a copy of the module and three calls, as much as a small pass. The entry of a module goes with it.
_PROBED: WeakKeyDictionary[nn.Module, _Probed] = WeakKeyDictionary()


def norm_parts(norm: nn.Module, like: Float[Tensor, "... d"]) -> NormParts:
    """Weight and bias of a norm, and whether it subtracts the mean, on the device of ``like``, in float32 at least.

    The norm is probed once, and again when its weights, their precision or their device have changed.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    weights = [*norm.parameters(), *norm.buffers()]
    kind, last = (like.device, dtype, like.shape[-1]), _PROBED.get(norm)
    if last is not None and last.kind == kind and _same(last.weights, weights):
        return last.parts
    # A tensor made in inference mode could take no part in a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        found = _Probed(kind, [w.detach().clone() for w in weights], _probe(norm, like, dtype))
    _PROBED[norm] = found
    return found.parts


def _same(before: list[Tensor], now: list[Tensor]) -> bool:
    # By value: in-place changes through ``.data`` leave no other trace.
    return len(before) == len(now) and all(
        old.dtype == new.dtype and old.device == new.device and torch.equal(old, new) for old, new in zip(before, now)
    )


def _probe(norm: nn.Module, like: Float[Tensor, "... d"], dtype: torch.dtype) -> NormParts:
    width = like.shape[-1]
    norm = copy.deepcopy(norm)
    norm._forward_hooks.clear()  # those of this pass come along
    norm._forward_pre_hooks.clear()
    norm.to(dtype)
    x = torch.ones(width, device=like.device, dtype=dtype)
    x[1::2] = -1.0  # of mean 0 and root mean square 1, no entry 0
    if width % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0]) * 0.5**0.5
    far = 64 * x[None]  # where what a norm adds to the mean square (1e-5 at most places) makes no difference
    up, down = norm(far)[0], norm(-far)[0]
    weight, bias = (up - down) / (2 * x), (up + down) / 2
    shifted = norm(far + 64)[0] - bias
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

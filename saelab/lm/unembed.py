"""The final norm and unembedding of a language model as plain tensors."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.lm.loading import load_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Unembedding(NamedTuple):
    """``logits = (normalised x * norm_weight) @ weight``, up to biases.

    ``normalised`` divides by the root mean square of ``x``, after subtracting its mean where ``centred`` (LayerNorm).
    """

    weight: Float[Tensor, "d_in vocab"]
    norm_weight: Float[Tensor, " d_in"] | None
    centred: bool


def unembedding(model: TransformerBridge | str | Path) -> Unembedding:
    """Unembedding matrix and final norm of a loaded model, or of one to load by name or folder; float32, on the CPU."""
    if isinstance(model, str | Path):
        found = unembedding(load_model(model, device="cpu"))
        gc.collect()  # a bridge refers to itself: without this the rest of the model would stay in memory
        return found
    bridge = model
    norm = bridge.ln_final.original_component
    weight = getattr(norm, "weight", None)
    if weight is not None:
        weight = weight.detach().float().cpu()
        if _adds_one(norm):
            weight = weight + 1.0
    return Unembedding(bridge.W_U.detach().float().cpu().clone(), weight, isinstance(norm, nn.LayerNorm))


def _adds_one(norm: nn.Module) -> bool:
    """Whether a norm multiplies by ``1 + weight`` (Gemma), found by applying it to a vector of unit RMS."""
    weight = norm.get_parameter("weight")
    x = torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    x[..., ::2] = -1.0
    if len(weight) % 2:
        return False
    with torch.no_grad():
        scale = (norm(x) / x).flatten()
    return bool((scale - weight - 1.0).abs().sum() < (scale - weight).abs().sum())

"""The variants. A new one is a file in this folder and its name in the import below."""

from saelab.sae import (  # noqa: F401
    abs_topk,
    batch_topk,
    feature_choice,
    gated,
    gradient_topk,
    jump_relu,
    matching_pursuit,
    matryoshka,
    mutual_choice,
    relu,
    topk,
)
from saelab.sae.base import SAE, VARIANTS, LinearSAE, build
from saelab.sae.layer_norm import LayerNormed, restore

__all__ = ["SAE", "VARIANTS", "LayerNormed", "LinearSAE", "build", "restore"]

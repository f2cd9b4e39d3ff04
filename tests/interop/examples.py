"""Small SAEs with every parameter away from its initial value."""

from __future__ import annotations

from typing import Any

import torch

from saelab.sae import SAE, build

D_IN, D_SAE = 16, 40


@torch.no_grad()
def example(variant: str, **config: Any) -> SAE:
    """A variant in eval mode whose biases, thresholds and norms all matter."""
    torch.manual_seed(0)
    if variant not in {"relu", "gated", "jump_relu"}:
        config = {("n_steps" if variant == "matching_pursuit" else "k"): 4, **config}
    sae = build(variant, D_IN, D_SAE, **config).eval()
    sae.b_dec.normal_()
    for name in ("b_enc", "b_mag", "r_mag"):
        if hasattr(sae, name):
            getattr(sae, name).normal_(std=0.1)
    threshold = getattr(sae, "threshold", None)
    if isinstance(threshold, torch.Tensor):
        threshold.uniform_(0.2, 0.8)
    elif threshold is not None:
        threshold.set_(torch.tensor(0.7))
    return sae


def probe(n: int = 64) -> torch.Tensor:
    """Activations ``[n, D_IN]``."""
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(7))

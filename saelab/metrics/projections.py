"""What a dictionary tells about the number of latents per token it was trained with (Chanin and Garriga-Alonso, 2025,
arXiv 2508.16560).

Where fewer latents may be active than features are, an SAE of correlated features mixes them, and where more may be,
it finds degenerate directions that mix them too. Either way its directions overlap more, with each other and with
activations that do not contain them. Both numbers here are therefore lowest near the right L0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.metrics.dictionary import living_rows

HELD = 1 << 25  # projections sorted at once: 128 MiB


@torch.no_grad()
def decoder_projections(
    x: Float[Tensor, "n d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    places: Sequence[int],
    signed: bool = False,
) -> list[float]:
    """The n-th decoder projection for each n of ``places``: of all ``(x - b_dec) . d_j / |d_j|``, over tokens and
    latents together, the one that has ``n`` per token above it.

    Units are those of the activations. ``signed`` takes magnitudes, as a latent with two poles may be active either
    way. Of more than ``HELD`` projections, evenly spread tokens count. UserError for an n outside 1 .. d_sae - 1.
    """
    W = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    for n in places:
        if not 1 <= n < W.shape[0]:
            raise UserError(f"the {n}-th decoder projection needs 1 <= n < d_sae={W.shape[0]}")
    step = max(1, -(-x.shape[0] * W.shape[0] // HELD))
    z = (x[::step].to(W) - b_dec.detach().to(W)) @ W.T
    order = (z.abs() if signed else z).flatten().sort(descending=True).values
    return [float(order[n * z.shape[0]]) for n in places]


def mean_cosine(W_dec: Float[Tensor, "d_sae d_in"]) -> float:
    """``c_dec``: the mean magnitude of the cosines between two different directions of a dictionary."""
    W = living_rows(W_dec).float()
    m = W.shape[0]
    if m < 2:
        raise UserError("coherence compares directions, and the dictionary has fewer than two that are not zero")
    total = sum(float((W[start : start + 1024] @ W.T).abs().double().sum()) for start in range(0, m, 1024))
    diagonal = float(W.square().sum(1).double().sum())
    return (total - diagonal) / (m * (m - 1))

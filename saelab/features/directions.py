"""What a latent's decoder row is close to: tokens of the vocabulary, and other latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LogitLens:
    """Direct effect of a direction in the residual stream on the logits (nostalgebraist, 2020).

    The effect of ``direction`` is ``(direction * norm_weight) @ unembed``, minus its mean over the vocabulary (which
    no softmax sees). The final norm's weight is folded in; its division by the token's own norm is left out, because
    it scales all logits of a token alike and depends on the token. ``centred`` norms (LayerNorm) also subtract the
    direction's mean first. For a hook before the last layer this ignores everything the later layers would do.
    """

    unembed: Float[Tensor, "d_in vocab"]
    norm_weight: Float[Tensor, " d_in"] | None = None
    centred: bool = False

    def effects(self, directions: Float[Tensor, "m d_in"]) -> Float[Tensor, "m vocab"]:
        """Logit change per unit of each direction."""
        directions = directions.to(self.unembed)
        if self.centred:
            directions = directions - directions.mean(1, keepdim=True)
        if self.norm_weight is not None:
            directions = directions * self.norm_weight.to(directions)
        logits = directions @ self.unembed
        return logits - logits.mean(1, keepdim=True)

    def extremes(
        self, directions: Float[Tensor, "m d_in"], n: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(values, token ids) of the ``n`` most promoted tokens, then of the most suppressed; each ``[m, n]``."""
        logits = self.effects(directions)
        n = min(n, logits.shape[1])
        up, down = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        return (up.values, up.indices), (down.values, down.indices)


def unit_rows(W: Float[Tensor, "m d_in"]) -> Float[Tensor, "m d_in"]:
    """Rows scaled to norm 1; zero rows stay zero."""
    return W / W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)


def neighbours(
    unit: Float[Tensor, "d_sae d_in"], start: int, stop: int, n: int, signed: bool
) -> tuple[Float[Tensor, "m n"], Int[Tensor, "m n"]]:
    """Cosines and numbers of the ``n`` closest other rows for rows ``start .. stop`` of a unit-row matrix.

    Closest is the largest cosine, or the largest absolute cosine where ``signed`` (the cosine keeps its sign).
    """
    cosines = unit[start:stop] @ unit.T
    key = cosines.abs() if signed else cosines.clone()
    key[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
    best = key.topk(min(n, unit.shape[0] - 1), dim=1).indices
    return cosines.gather(1, best), best

"""Why latents were selected on one token, and the effect of each active latent on the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae import SAE


class Contender(NamedTuple):
    """One latent in the contest for a token. ``margin`` is its score minus the cut, negative for a loser."""

    latent: int
    pre_act: float
    score: float
    activation: float  # 0 for one that lost
    margin: float


class Contest(NamedTuple):
    """Winners and the closest losers, both by margin. ``rule`` says in words what the cut is."""

    winners: list[Contender]
    losers: list[Contender]
    cut: float | None  # None where every latent has its own: score - margin
    rule: str
    score: str  # in words


class Effect(NamedTuple):
    """What an active (or nearly active) latent does to the loss, to first order."""

    latent: int
    activation: float
    gradient: float  # W_dec[latent] . g: loss per unit of activation
    effect: float  # activation x gradient: the loss this latent adds; negative lowers it


@torch.no_grad()
def contest(
    sae: SAE, x: Float[Tensor, " d_in"], grad: Float[Tensor, " d_in"] | None = None, losers: int = 10
) -> Contest | None:
    """The latents selected on the token ``x`` (raw units, inference rule), their margins, and the closest losers.

    A latent's score is what the variant's selection compares (:meth:`saelab.SAE.contest`; ``grad`` is the loss's
    gradient at ``x``). With a threshold the margin is the distance to it; otherwise the distance between a winner and
    the best loser, or between a loser and the weakest winner. None where latents do not compete all at once.
    """
    row = x[None].to(sae.device)
    grads = None if grad is None else grad[None].to(row)
    scores = sae.contest(row, grads)
    if scores is None:
        return None
    u, score, cut, what = scores
    code = sae.encode(row, grads).nonzero()
    value = torch.zeros_like(score)
    value[code.indices] = code.values
    won = value != 0
    rule = "one threshold for all latents"
    if cut is None:
        best_loser = score[~won].max() if bool((~won).any()) else score.new_tensor(0.0)
        # A pre-activation below zero never fires, however much room the budget leaves.
        best_loser = best_loser.clamp_min(0.0)
        weakest = score[won].min() if bool(won.any()) else score.new_tensor(0.0)
        margin = torch.where(won, score - best_loser, score - weakest)
        cut_value, rule = float(weakest), f"the weakest of the {int(won.sum())} winners"
        if best_loser > weakest:
            rule += " (this variant does not select by the score alone)"
    else:
        margin = score - cut
        cut_value = float(cut) if cut.ndim == 0 else None
        rule = rule if cut.ndim == 0 else "each latent's own threshold"
    fields = [t.tolist() for t in (u, score, value, margin)]
    # By margin: where every latent has its own threshold, the score does not show how close a latent came.
    order = margin.argsort(descending=True, stable=True).tolist()
    contenders = [Contender(j, *(column[j] for column in fields)) for j in order]
    made, lost = ([c for c in contenders if (c.activation != 0) == side] for side in (True, False))
    return Contest(made, lost[:losers], cut_value, rule, what)


@torch.no_grad()
def effects(sae: SAE, x: Float[Tensor, " d_in"], grad: Float[Tensor, " d_in"]) -> list[Effect]:
    """Activation x gradient of every active latent, largest effect first.

    ``grad`` is the loss's gradient at ``x``. Removing a latent changes the loss by ``-effect`` to first order.
    """
    code = sae.features(sae.encode(x[None].to(sae.device), grad[None].to(sae.device))).nonzero()
    slope = sae.W_dec[code.indices] @ grad.to(sae.W_dec)
    rows = zip(code.indices.tolist(), code.values.tolist(), slope.tolist(), (code.values * slope).tolist())
    return sorted((Effect(*row) for row in rows), key=lambda e: -abs(e.effect))


def inert_and_causal(found: list[Effect], share: float = 0.25) -> tuple[list[Effect], list[Effect]]:
    """Active but inert, and quiet but causal.

    *Inert*: among the upper half by activation, but in the lowest ``share`` by effect. *Causal*: among the lower half
    by activation, but in the highest ``share`` by effect. Both by magnitude.
    """
    if len(found) < 4:
        return [], []
    loud = sorted(found, key=lambda e: -abs(e.activation))
    by_effect = sorted(found, key=lambda e: -abs(e.effect))
    few, half = max(1, math.ceil(share * len(found))), len(found) // 2
    weak, strong = set(by_effect[-few:]), set(by_effect[:few])
    return [e for e in loud[:half] if e in weak], [e for e in by_effect if e in strong and e not in loud[:half]]

"""Why a latent won: the contest on one token, what it did to the loss, and the replay of a pursuit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae import SAE, LinearSAE
from saelab.sae.penalty import PenaltySAE


class Contender(NamedTuple):
    """One latent in the contest for a token. ``margin`` is how far its score is above the cut (below: negative)."""

    latent: int
    pre_act: float
    score: float
    activation: float  # 0 for one that lost
    margin: float


class Contest(NamedTuple):
    """Winners and the losers that came nearest, both by margin. ``rule`` says in words what the cut is."""

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


class PursuitStep(NamedTuple):
    """One step of matching pursuit on a token."""

    latent: int
    coefficient: float
    residual_norm: float  # after the step
    runner_up: int
    runner_up_product: float


@torch.no_grad()
def contest(
    sae: LinearSAE, x: Float[Tensor, " d_in"], grad: Float[Tensor, " d_in"] | None = None, losers: int = 10
) -> Contest:
    """Who won the token ``x`` (raw units, inference rule), by how much, and who came close.

    A latent's score is what selection compares: its pre-activation, or the magnitude in a signed SAE, weighted by
    the gradient ``grad`` where an SAE selects by gradients at inference. With a threshold the margin is the distance
    to it; with a budget per token, the distance between a winner and the best loser, or between a loser and the
    weakest winner.
    """
    row = x[None].to(sae.device)
    u = sae.pre_acts(row, slice(0, sae.d_sae))[0]
    grads = None if grad is None else grad[None].to(row)
    score, what = _score(sae, u, grads)
    code = sae.encode(row, grads).nonzero()
    value = torch.zeros_like(u)
    value[code.indices] = code.values
    won = value != 0
    cut, rule = thresholds(sae), "one threshold for all latents"
    if cut is None:
        best_loser = score[~won].max() if bool((~won).any()) else score.new_tensor(0.0)
        # A pre-activation below zero never fires, however much room the budget leaves.
        best_loser = best_loser.clamp_min(0.0)
        weakest = score[won].min() if bool(won.any()) else score.new_tensor(0.0)
        margin = torch.where(won, score - best_loser, score - weakest)
        cut_value, rule = float(weakest), f"the weakest of the {int(won.sum())} winners"
    else:
        margin = score - cut
        cut_value = float(cut) if cut.ndim == 0 else None
        rule = rule if cut.ndim == 0 else "each latent's own threshold"
    fields = [t.tolist() for t in (u, score, value, margin)]
    # By margin: where every latent has its own threshold, a high score says nothing of how close it came.
    order = margin.argsort(descending=True, stable=True).tolist()
    contenders = [Contender(j, *(column[j] for column in fields)) for j in order]
    made, lost = ([c for c in contenders if (c.activation != 0) == side] for side in (True, False))
    return Contest(made, lost[:losers], cut_value, rule, what)


def _score(sae: LinearSAE, u: Tensor, grads: Tensor | None) -> tuple[Tensor, str]:
    """What selection compares, and its name."""
    from saelab.sae.gated import GatedSAE
    from saelab.sae.gradient_topk import GradientTopK

    score, what = (u.abs(), "magnitude of the pre-activation") if sae.signed else (u, "pre-activation")
    if isinstance(sae, GatedSAE):
        return score, "pre-activation of the gate"
    if grads is None or not isinstance(sae, GradientTopK) or sae.grad_select == "train_only":
        return score, what
    return score * sae.score_weights(grads)[0], f"{what} × (1 + β |gradient along the latent|)"


def thresholds(sae: LinearSAE) -> Tensor | None:
    """The inference threshold of an SAE, one number or one per latent; None where a budget per token decides."""
    cut = sae.inference_threshold()
    if cut is None and isinstance(sae, PenaltySAE):
        cut = sae.b_enc.new_zeros(())  # every positive pre-activation fires
    return None if cut is None else cut.to(sae.W_enc)


@torch.no_grad()
def effects(sae: SAE, x: Float[Tensor, " d_in"], grad: Float[Tensor, " d_in"]) -> list[Effect]:
    """Activation x gradient of every active latent, largest effect first.

    ``grad`` is the loss's gradient at ``x``. Removing a latent changes the loss by ``-effect`` to first order.
    """
    code = sae.encode(x[None].to(sae.device), grad[None].to(sae.device)).nonzero()
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


@torch.no_grad()
def replay(
    sae: SAE, x: Float[Tensor, " d_in"], n_steps: int, residual_stop: float = 0.0, stop_on_repeat: bool = False
) -> tuple[list[PursuitStep], float]:
    """The steps of matching pursuit on a token, and the norm it starts from.

    The rules are those of :func:`saelab.kernels.pursuit`: the largest signed product wins, the pursuit ends without a
    positive one, when the residual is at most ``residual_stop``, or after an atom is taken again where asked.
    """
    residual = x.to(sae.W_dec) - sae.b_dec
    start, taken, made = float(residual.norm()), set(), []
    for _ in range(n_steps):
        if float(residual.norm()) <= residual_stop:
            break
        best = (sae.W_dec @ residual).topk(min(2, sae.d_sae))
        latent, product = int(best.indices[0]), float(best.values[0])
        if product <= 0:
            break
        residual = residual - best.values[0] * sae.W_dec[latent]
        second = (int(best.indices[1]), float(best.values[1])) if sae.d_sae > 1 else (latent, product)
        made.append(PursuitStep(latent, product, float(residual.norm()), *second))
        if stop_on_repeat and latent in taken:
            break
        taken.add(latent)
    return made, start

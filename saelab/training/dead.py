"""Which latents are dead, for the AuxK loss and the log.

A GPU would have to be waited for to learn how many there are. There, all latents that may die during the next few steps
are listed once in a while, and each step marks those of the list that are dead now: the loss is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saelab.losses import Subset
from saelab.sae import SAE, LinearSAE
from saelab.training.config import TrainConfig
from saelab.training.readings import READ_EVERY
from saelab.training.state import TrainState


class Aux(NamedTuple):
    """One auxiliary loss: its weight, copies of its latents' rows, and how many latents take part."""

    weight: float
    rows: Subset
    taking_part: Tensor | None  # None: all that are listed


def mark_fired(state: TrainState, fired: Tensor, n: int) -> None:
    """Count ``n`` more tokens since each latent fired, and none for those that did."""
    state.tokens_since_fired += n
    state.tokens_since_fired.masked_fill_(fired, 0)


def auxiliary(sae: SAE, state: TrainState, config: TrainConfig, n: int, listed: bool) -> dict[str, Aux]:
    """The auxiliary losses of a step, by name, each with at least one latent on its list."""
    limit = config.dead_limit
    if listed:
        if _marks(type(sae)):
            return _marked(sae, state, config, n)
        latents = candidates(state, limit, n)
        terms = sae.aux_latents(latents, config.aux_weight)
        if all(chosen is latents for _, chosen in terms.values()):
            if not latents.numel():
                return {}
            active = (state.tokens_since_fired > limit)[latents]
            count = active.sum()
            return {
                name: Aux(weight, _copied(sae, latents, active), count) for name, (weight, _) in terms.items() if weight
            }
    dead = (state.tokens_since_fired > limit).nonzero().flatten()
    terms = sae.aux_latents(dead, config.aux_weight)
    return {name: Aux(weight, _copied(sae, latents), None) for name, (weight, latents) in terms.items() if weight}


def candidates(state: TrainState, limit: int, n: int) -> Tensor:
    """Latents that are dead or can die before the list is renewed. It is renewed at the same steps in a resumed run."""
    steps = _interval(limit, n)
    if state.listed is None or state.step % steps == 0:
        state.listed = (state.tokens_since_fired > limit - steps * n).nonzero().flatten()
    return state.listed


def _interval(limit: int, n: int) -> int:
    # A list of those that have been silent for three quarters of the limit is not much longer than that of the dead.
    return max(1, min(READ_EVERY, limit // (4 * n)))


def _marks(variant: type[SAE]) -> bool:
    """Whether the class that says which latents shall help says so with masks, too."""
    return "aux_marks" in vars(next(each for each in variant.__mro__ if "aux_latents" in vars(each)))


def _marked(sae: SAE, state: TrainState, config: TrainConfig, n: int) -> dict[str, Aux]:
    """The auxiliary losses of a variant that marks latents by a rule of its own, each on its list."""
    limit, found = config.dead_limit, {}
    is_dead = state.tokens_since_fired > limit
    marks = sae.aux_marks(is_dead, config.aux_weight)
    if not marks:
        return {}
    steps, latents = _interval(limit, n), candidates(state, limit, n)
    if state.ahead is None or state.step % steps == 0 or sae.aux_renews(state.step):
        may_die = state.tokens_since_fired > limit - steps * n
        state.ahead = (may_die | sae.aux_ahead(n, steps)).nonzero().flatten()
    for name, (weight, mark) in marks.items():
        listed = latents if mark is is_dead else state.ahead
        if weight and listed.numel():
            active = mark[listed]
            found[name] = Aux(weight, _copied(sae, listed, active), active.sum())
    return found


def _copied(sae: SAE, latents: Tensor, active: Tensor | None = None) -> Subset:
    assert isinstance(sae, LinearSAE)  # others are refused before the run begins
    if not sae.W_dec.is_leaf:  # gathered from other processes: the gradient has to go back the same way
        return Subset.of(sae, latents, active)
    return Subset.copied(sae, latents, active)


def number(state: TrainState, config: TrainConfig) -> Tensor:
    """How many latents of this process are dead."""
    dead = state.tokens_since_fired > config.dead_limit
    return dead.sum(dtype=torch.float32 if dead.device.type == "mps" else torch.float64)

"""The damage to one generated text: how far the steered model is from the unsteered one on it, and how likely it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.offload import device_of
from saelab.lm.sites import underlying
from saelab.steering.attachment import attach
from saelab.steering.generation import forward
from saelab.steering.interventions import Intervention


@dataclass(frozen=True)
class TextDamage:
    """Of one text, over its generated tokens."""

    kl: float  # mean KL(unsteered || steered) of the distribution of each token, nats
    perplexity: float  # under the unsteered model


@torch.no_grad()
def measure_text(
    model: nn.Module,
    prompt: Sequence[int],
    written: Sequence[int],
    interventions: Intervention | Sequence[Intervention],
    roles: Sequence[int] | None = None,
) -> TextDamage:
    """The damage to a text that was generated from ``prompt`` under ``interventions``; both are token ids.

    A text that is likely under the unsteered model has a low perplexity, and so has one that repeats itself. ``roles``
    are those of the prompt's tokens, in a chat. UserError where nothing was written.
    """
    if not len(written):
        raise UserError("nothing was written, so there is no damage to measure")
    ids = torch.tensor([[*prompt, *written]], device=device_of(model))
    known = None if roles is None else torch.tensor([list(roles)])
    parts = []
    for steps in ([], interventions):
        with attach(model, steps) as positions, positions.generating(len(prompt), known):
            parts.append(_log_probabilities(model, ids, len(prompt)))
    before, after = parts
    kl = (before.exp() * (before - after)).sum(-1).clamp(min=0)
    surprise = -before.gather(-1, ids[0, len(prompt) :, None])[:, 0].double().mean()
    # A ratio beyond the largest number is infinite.
    return TextDamage(float(kl.double().mean()), math.exp(surprise) if surprise < 700 else math.inf)


def _log_probabilities(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """``[written, vocabulary]``: the distribution of each token behind the prompt."""
    logits = forward(underlying(model), ids, torch.ones_like(ids))[0]
    return logits[0, prompt - 1 : -1].float().log_softmax(-1)

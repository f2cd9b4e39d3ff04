"""Test two claims about steering with latents: how far latents move predictions, and whether in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from saelab.lm.tokens import Prompts
from saelab.metrics import bootstrap
from saelab.runs import Run, as_run
from saelab.sae import SAE
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.operations import Add
from saelab.steering.vectors import SteeringVector, Strength


@dataclass(frozen=True)
class EffectSize:
    """How far latents move the predictions in contexts that were not chosen for them."""

    latents: list[int]
    strength: str
    kl: list[float]  # mean KL(unsteered || steered) per token, one number per latent
    mean: float
    low: float  # 95 % bootstrap interval over latents
    high: float


def effect_size(
    model: nn.Module,
    run: Run | SAE | Path | str,
    latents: Sequence[int],
    prompts: Prompts,
    strength: Strength = "1max",
    *,
    pole: int = 1,
    hook_name: str = "",
    tokenizer: Any = None,
    seed: int = 0,
) -> EffectSize:
    """Add each latent's direction on every token of ``prompts`` and measure the change of the predictions.

    This is how the claim of gradient-aware SAEs (Olmo et al., 2024: latents that move logits more in arbitrary
    contexts) is compared between SAEs: the same prompts, an equal number of latents drawn at random, and a strength
    that is either the same length for all or, with ``"1max"``, each latent's own largest activation.
    """
    source, baseline = as_run(run, hook_name), UnsteeredBaseline(model, prompts, tokenizer=tokenizer)
    adds = [Add(SteeringVector.from_latent(source, latent, pole), strength) for latent in latents]
    kl = [baseline.measure(add).mean_kl for add in adds]
    low, high = bootstrap(np.array(kl), np.mean, seed=seed)
    return EffectSize(list(latents), str(strength), kl, float(np.mean(kl)), low, high)


@dataclass(frozen=True)
class TwoWay:
    """The effect of one latent, steered to each pole, on the words of both poles."""

    latent: int
    up: tuple[float, float, float]  # logit shift of plus words against minus words at +strength: mean, low, high
    down: tuple[float, float, float]  # the same at -strength

    @property
    def verdict(self) -> str:
        """ "both ways" if each sign moves the words its way by more than chance over prompts."""
        plus, minus = self.up[1] > 0, self.down[2] < 0
        if plus and minus:
            return "both ways"
        return "plus only" if plus else "minus only" if minus else "neither way"


def two_way(
    model: nn.Module,
    run: Run | SAE | Path | str,
    latent: int,
    prompts: Prompts,
    plus: Sequence[str] | Sequence[int],
    minus: Sequence[str] | Sequence[int],
    strength: Strength = "1max",
    *,
    hook_name: str = "",
    tokenizer: Any = None,
    seed: int = 0,
) -> TwoWay:
    """Steer with one latent in both directions, as AbsTopK (Zhu et al., 2025) says a single signed latent can.

    ``plus`` and ``minus`` are the words each pole is said to stand for; a strength in ``max`` is taken of each pole's
    own largest activation. Intervals are over prompts (at least two).
    """
    source = as_run(run, hook_name)
    baselines = [UnsteeredBaseline(model, prompts, words, tokenizer=tokenizer) for words in (plus, minus)]
    ends = []
    for pole in (1, -1):
        add = Add(SteeringVector.from_latent(source, latent, pole), strength)
        shifts = [baseline.measure(add).logit_shift for baseline in baselines]
        gap = (shifts[0] - shifts[1]).double().numpy()
        ends.append((float(gap.mean()), *bootstrap(gap, np.mean, seed=seed)))
    return TwoWay(latent, ends[0], ends[1])

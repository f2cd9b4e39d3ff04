"""Dose-response curves: the effect and the damage of a vector at several strengths, compared with controls.

A latent is useful for steering only if it moves the model towards the concept more than a difference of means does,
and more than random directions do, *at the same damage*: at equal strength one direction may simply be more
destructive than another. The verdict therefore compares effects at one off-target KL, interpolated along each curve,
with an interval over prompts and, for random directions, over the sample of directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from saelab.errors import UserError
from saelab.lm.tokens import end_ids, tokenize
from saelab.steering.directions import difference_of_means, random_direction
from saelab.steering.generation import generate_tokens
from saelab.steering.measure.effects import Effects, UnsteeredBaseline, repetition
from saelab.steering.operations import Add
from saelab.steering.vectors import SteeringVector, Strength

Array = NDArray[np.float64]
_RESAMPLES = 1000


@dataclass(frozen=True)
class Dose:
    """One direction at one strength."""

    direction: str
    strength: float  # in units of the activations
    concept_mass: float  # probability of a concept token next, mean over the target prompts
    logit_shift: float  # of the concept tokens against all tokens
    kl: float  # off target, nats per token
    perplexity_ratio: float  # off target
    repetition: float | None  # of continuations of the target prompts; None when none were generated
    probe_score: float | None  # what ``score`` gave for the continuations


@dataclass(frozen=True, eq=False)
class Curve:
    """One direction over all strengths, per prompt: ``effect [strengths, targets]``, ``kl [strengths, neutral]``."""

    effect: Array
    kl: Array

    def at(self, budget: float, targets: Array, neutral: Array) -> Array:
        """Effect at off-target KL ``budget`` for each resample, by linear interpolation from (0, 0).

        ``targets [resamples, prompts]`` and ``neutral`` are weights that sum to one.
        """
        effect, kl = targets @ self.effect.T, neutral @ self.kl.T
        zero = np.zeros((len(effect), 1))
        effect, kl = np.hstack([zero, effect]), np.hstack([zero, kl])
        # A curve that bends back is followed up to where it first reached each KL.
        kl = np.maximum.accumulate(kl, axis=1)
        return np.array([np.interp(budget, k, e) for k, e in zip(kl, effect)])


@dataclass(frozen=True)
class Contrast:
    """The vector's effect minus a control's, at the same off-target KL."""

    control: str
    difference: float
    low: float  # 95 % bootstrap interval over prompts; NaN where there is one prompt
    high: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return f"not to be judged against {self.control} on one prompt"
        if self.low > 0:
            return f"better than {self.control}"
        return f"worse than {self.control}" if self.high < 0 else f"not distinguishable from {self.control}"


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """All doses, the curves behind them, and the comparison with the controls."""

    doses: list[Dose]
    contrasts: list[Contrast]
    kl_budget: float  # the off-target KL at which directions are compared
    curves: dict[str, Curve] = field(repr=False)

    @property
    def verdict(self) -> str:
        """One sentence."""
        findings = ", ".join(contrast.verdict for contrast in self.contrasts)
        return f"at an off-target KL of {self.kl_budget:.3g} nats per token the vector is {findings}"

    def of(self, direction: str = "vector") -> list[Dose]:
        """The doses of one direction, by strength."""
        return sorted((d for d in self.doses if d.direction == direction), key=lambda d: d.strength)


def dose_response(
    model: nn.Module,
    vector: SteeringVector,
    targets: Sequence[str],
    neutral: Sequence[str],
    concept: Sequence[str] | Sequence[int],
    *,
    strengths: Sequence[Strength] = ("0.1norm", "0.2norm", "0.4norm", "0.8norm"),
    positive: Sequence[str] = (),
    negative: Sequence[str] = (),
    n_random: int = 4,
    kl_budget: float = 0.5,
    max_new_tokens: int = 0,
    score: Callable[[str], float] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> DoseResponse:
    """Measure ``vector`` at ``strengths`` beside a difference of means and random directions of the same lengths.

    ``targets`` are prompts on which the concept could come next, ``neutral`` texts measure the damage. ``concept``
    lists words or token ids; choose it before looking at the vector. ``positive`` and ``negative`` texts make the
    difference of means (left out where there are none); a verdict on it needs two targets, one on random directions
    two of them. With
    ``max_new_tokens`` the targets are also continued, for repetition and for ``score(text)``. The comparison is made
    at ``kl_budget``, or at the largest KL that all directions reached if that is smaller.
    """
    lengths = sorted(vector.length(strength) for strength in strengths)
    if not lengths or lengths[0] <= 0:
        raise UserError("strengths must be positive; negate the vector (-vector) to steer the other way")
    directions = {"vector": vector}
    if positive or negative:
        directions["difference of means"] = difference_of_means(
            model, vector.hook_name, positive, negative, tokenizer=tokenizer
        )
    for i in range(n_random):
        directions[f"random {i}"] = random_direction(vector, seed + i)
    on = UnsteeredBaseline(model, targets, concept, tokenizer=tokenizer)
    off = UnsteeredBaseline(model, neutral, tokenizer=tokenizer)
    if not on.concept.numel():
        raise UserError("concept is empty: give words or token ids whose probability should rise")
    doses: list[Dose] = []
    curves: dict[str, Curve] = {}
    for name, direction in directions.items():
        measured = []
        for length in lengths:
            add = Add(direction, length)
            effects, damage = on.measure(add), off.measure(add)
            measured.append((effects.logit_shift.double().numpy(), damage.kl.double().numpy()))
            doses.append(_dose(name, length, effects, damage, *_continue(on, add, max_new_tokens, score)))
        curves[name] = Curve(*(np.array(column) for column in zip(*measured)))
    return DoseResponse(doses, *_compare(curves, kl_budget, seed), curves)


def interval_of_another(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Lower end, mean and upper end, at each strength, of the 95 % prediction interval for one more direction.

    ``curves`` are those of at least two random directions, ``[directions, strengths]``; Student's t for their spread.
    """
    from scipy.special import stdtrit

    values = np.asarray(curves, dtype=float)
    n = len(values)
    middle = values.mean(axis=0)
    half = stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) * np.sqrt(1 + 1 / n)
    return (middle - half).tolist(), middle.tolist(), (middle + half).tolist()


def _dose(
    name: str, length: float, effects: Effects, damage: Effects, repeated: float | None, scored: float | None
) -> Dose:
    return Dose(
        name,
        length,
        float(effects.mass.mean()),
        float(effects.logit_shift.mean()),
        damage.mean_kl,
        damage.perplexity_ratio,
        repeated,
        scored,
    )


def _continue(
    baseline: UnsteeredBaseline, add: Add, max_new_tokens: int, score: Callable[[str], float] | None
) -> tuple[float | None, float | None]:
    if max_new_tokens == 0:
        return None, None
    ids, mask = tokenize(baseline.tokenizer, baseline.prompts)
    tokenizer = baseline.tokenizer
    rows = generate_tokens(
        baseline.model, ids, mask, add, eos=end_ids(baseline.model, tokenizer), max_new_tokens=max_new_tokens
    )
    repeated = float(np.mean([repetition(row) for row in rows]))
    if score is None:
        return repeated, None
    return repeated, float(np.mean([score(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]))


def _compare(curves: dict[str, Curve], kl_budget: float, seed: int) -> tuple[list[Contrast], float]:
    budget = min([kl_budget, *(float(curve.kl.mean(axis=1).max()) for curve in curves.values())])
    rng = np.random.default_rng(seed)
    vector = curves["vector"]
    targets, neutral = (_weights(rng, n) for n in (vector.effect.shape[1], vector.kl.shape[1]))
    at = {name: curve.at(budget, targets, neutral) for name, curve in curves.items()}
    contrasts = []
    if "difference of means" in at:
        differences = at["vector"] - at["difference of means"]
        if targets.shape[1] == 1:  # resampled, it is itself: the interval would have no width
            differences[1:] = np.nan
        contrasts.append(_contrast("difference of means", differences))
    drawn = np.array([effect for name, effect in at.items() if name.startswith("random")])
    if len(drawn) > 1:
        # One more random direction, of which these are a sample: their mean, and Student's t for its spread.
        n, spread = len(drawn), drawn.std(axis=0, ddof=1)
        another = rng.standard_t(n - 1, size=spread.shape) * spread * np.sqrt(1 + 1 / n)
        another[0] = 0.0
        contrasts.append(_contrast("random directions", at["vector"] - drawn.mean(axis=0) - another))
    return contrasts, budget


def _contrast(control: str, differences: Array) -> Contrast:
    low, high = np.quantile(differences[1:], [0.025, 0.975])
    return Contrast(control, float(differences[0]), float(low), float(high))


def _weights(rng: np.random.Generator, n: int) -> Array:
    """Bootstrap weights ``[1 + resamples, n]``; the first row is the sample itself."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
    return np.vstack([np.full((1, n), 1 / n), drawn])

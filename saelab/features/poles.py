"""One axis or two features? Whether the poles of a signed latent live in the same contexts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from saelab.errors import UserError
from saelab.features.index import FeatureIndex
from saelab.features.schema import Example

FIRING = ("top", "q75", "q50", "q25", "q00", "random")


@dataclass(frozen=True)
class AxisScore:
    """``score = between / within``: mean similarity of windows from different poles over that within a pole.

    Near 1 the poles share their contexts: opposite values of one variable. Near 0 they share only a direction: two
    features that the dictionary packed into one latent. ``verdict`` is "one axis" from 0.7 on, "two features" up to
    0.3, "mixed" in between, "one-sided" where a pole has too few windows, and "diffuse" where windows of one pole are
    no more alike than those of different latents, so that the ratio says nothing.
    """

    score: float
    between: float
    within: float
    unrelated: float
    verdict: str


def axis_score(index: FeatureIndex, latent: int, *, reach: int = 8, fewest: int = 4) -> AxisScore:
    """Compare the poles' windows (``reach`` tokens around the focus) as TF-IDF bags of tokens.

    Similarities are cosines, less the mean similarity of windows of unrelated latents, so that what all text shares
    does not count. Raises UserError for an SAE without negative activations.
    """
    if len(index.poles) < 2:
        raise UserError("this SAE has no negative activations; only latents of signed SAEs have two poles")
    nan = float("nan")
    rarity, backdrop = _backdrop(index, reach)
    bags = [_bags(_firing(index.examples(latent, pole)), reach, rarity) for pole in (1, -1)]
    if min(len(pole) for pole in bags) < fewest:
        return AxisScore(nan, nan, nan, _mean_similarity(backdrop, None), "one-sided")
    unrelated = _mean_similarity(backdrop, None)
    between = _mean_similarity(*bags) - unrelated
    within = float(np.mean([_mean_similarity(pole, None) for pole in bags])) - unrelated
    if within <= max(0.5 * unrelated, 0.01):
        return AxisScore(nan, between, within, unrelated, "diffuse")
    score = float(np.clip(between / within, 0.0, 1.0))
    verdict = "one axis" if score >= 0.7 else "two features" if score <= 0.3 else "mixed"
    return AxisScore(score, between, within, unrelated, verdict)


Bag = dict[int, float]


def _firing(examples: list[Example]) -> list[Example]:
    """Windows around firings, each row once."""
    return list({e.row: e for e in examples if e.kind in FIRING}.values())


def _tokens(example: Example, reach: int) -> list[int]:
    return example.tokens[max(example.focus - reach, 0) : example.focus + reach + 1]


def _bags(examples: list[Example], reach: int, rarity: dict[int, float]) -> list[Bag]:
    """Unit-norm TF-IDF vectors."""
    bags = []
    for example in examples:
        counted = Counter(_tokens(example, reach))
        bag = {token: n * rarity.get(token, max(rarity.values(), default=1.0)) for token, n in counted.items()}
        norm = np.sqrt(sum(v * v for v in bag.values())) or 1.0
        bags.append({token: v / norm for token, v in bag.items()})
    return bags


def _backdrop(index: FeatureIndex, reach: int, sample: int = 200) -> tuple[dict[int, float], list[Bag]]:
    """Inverse document frequency of tokens, and bags, of windows of many latents (silent ones: plain corpus text)."""
    latents = np.unique(np.linspace(0, index.d_sae - 1, min(sample, index.d_sae)).astype(int))
    windows: list[Example] = []
    for latent in latents:
        windows += index.examples(int(latent), 1, "silent")[:2]
    seen = Counter(token for window in windows for token in set(_tokens(window, reach)))
    rarity = {token: float(np.log((1 + len(windows)) / n)) for token, n in seen.items()}
    return rarity, _bags(windows, reach, rarity)


def _mean_similarity(a: list[Bag], b: list[Bag] | None) -> float:
    """Mean cosine over pairs of one window of each list, or over pairs of different windows of one list."""
    if b is None:
        total, norms = _sum(a), float(sum(v * v for bag in a for v in bag.values()))
        pairs = len(a) * (len(a) - 1)
        return (_dot(total, total) - norms) / pairs if pairs else 0.0
    return _dot(_sum(a), _sum(b)) / max(len(a) * len(b), 1)


def _sum(bags: list[Bag]) -> Bag:
    total: Counter[int] = Counter()
    for bag in bags:
        total.update(bag)
    return dict(total)


def _dot(a: Bag, b: Bag) -> float:
    return float(sum(v * b.get(token, 0.0) for token, v in a.items()))

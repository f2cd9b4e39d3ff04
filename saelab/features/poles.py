"""One axis or two features: whether the poles of a signed latent fire in the same contexts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

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
    0.3, "mixed" in between, "one-sided" where a pole fires too rarely, "too few examples" where it fires and the index
    keeps too few windows of it, or of other text, and "diffuse" where windows of one pole are no more alike than those
    of different latents, so that the ratio is meaningless.
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
    windows = [_tokens(example, reach) for example in _unrelated(index)]
    poles = [[_tokens(example, reach) for example in _firing(index.examples(latent, pole))] for pole in (1, -1)]
    backdrop, *bags = _bags(windows, poles)
    if min(map(len, (windows, *poles))) < fewest:
        rare = min(index.latent(latent, pole)["count"] for pole in (1, -1)) < fewest
        verdict = "one-sided" if rare else "too few examples"
        return AxisScore(nan, nan, nan, _mean_similarity(backdrop, None), verdict)
    unrelated = _mean_similarity(backdrop, None)
    between = _mean_similarity(*bags) - unrelated
    within = float(np.mean([_mean_similarity(pole, None) for pole in bags])) - unrelated
    if within <= max(0.5 * unrelated, 0.01):
        return AxisScore(nan, between, within, unrelated, "diffuse")
    score = float(np.clip(between / within, 0.0, 1.0))
    verdict = "one axis" if score >= 0.7 else "two features" if score <= 0.3 else "mixed"
    return AxisScore(score, between, within, unrelated, verdict)


def _firing(examples: list[Example]) -> list[Example]:
    """Windows around firings, each row once."""
    return list({e.row: e for e in examples if e.kind in FIRING}.values())


def _unrelated(index: FeatureIndex, sample: int = 200) -> list[Example]:
    """Windows of many latents, on which they are silent: plain corpus text."""
    latents = np.unique(np.linspace(0, index.d_sae - 1, min(sample, index.d_sae)).astype(int))
    return [example for latent in latents for example in index.examples(int(latent), 1, "silent")[:2]]


def _tokens(example: Example, reach: int) -> list[int]:
    return example.tokens[max(example.focus - reach, 0) : example.focus + reach + 1]


def _bags(windows: list[list[int]], poles: list[list[list[int]]]) -> list[np.ndarray]:
    """Unit-norm TF-IDF vectors ``[windows, tokens]`` of plain text and of the poles' windows.

    A token's inverse document frequency is ``log((1 + n) / n_with_it)`` over the ``n`` windows of plain text; one that
    is in none of them is as rare as the rarest. (scikit-learn's TfidfTransformer adds 1, which weighs common tokens.)
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.preprocessing import normalize

    parts = [[Counter(map(str, window)) for window in part] for part in (windows, *poles)]
    vectorizer = DictVectorizer(sparse=False)
    stacked = np.asarray(vectorizer.fit_transform([*parts[0], *parts[1], *parts[2], {"": 1}]))  # never without a token
    sizes = np.cumsum([len(part) for part in parts])
    seen = (stacked[: sizes[0]] > 0).sum(axis=0)
    rarity = np.log((1 + len(windows)) / np.maximum(seen, 1))
    rarity[seen == 0] = rarity[seen > 0].max() if seen.any() else 1.0
    bags: Any = normalize(stacked * rarity)
    return np.split(bags, sizes)[:3]


def _mean_similarity(a: np.ndarray, b: np.ndarray | None) -> float:
    """Mean cosine over pairs of one window of each list, or over pairs of different windows of one list."""
    total = a.sum(axis=0)
    if b is None:
        pairs = len(a) * (len(a) - 1)
        return float(total @ total - (a * a).sum()) / pairs if pairs else 0.0
    return float(total @ b.sum(axis=0)) / max(len(a) * len(b), 1)

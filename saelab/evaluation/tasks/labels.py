"""How well the latents' own labels, sets of tokens, predict where they fire: the numbers beside every label.

A random transformer's latents are described well by tokens too, because the text itself is sparse (Heap et al., 2025,
arXiv 2501.17727), so these numbers mean something only beside their controls.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.label_scores import LabelScores, label_scores
from saelab.metrics.intervals import Estimate, bootstrap, proportion
from saelab.sae import SAE

GOOD = 0.5  # F1 above which a label is counted as a description
QUANTILES = 101


def label_task(sae: SAE, cache: ActivationCache, max_tokens: int) -> dict[str, Any]:
    """Mean F1 of the labels over poles that fire, the share above 0.5, and the quantiles of the F1."""
    if not cache.n_vocabulary:
        raise UserError(f"{cache.path} has no vocabulary, so its words are unknown; harvest it from a language model")
    return summary(label_scores(sae, cache, IndexConfig(max_tokens=max_tokens)))


def summary(scores: LabelScores) -> dict[str, Any]:
    """The task's numbers, ready for JSON."""
    n = len(scores.f1)
    if n == 0:
        raise UserError("no latent fires on these tokens; evaluate on more of them")
    over = f"95 % bootstrap over {n} poles" if n > 1 else "none: one pole"
    formula = {
        "mean_f1": "mean over poles that fire of the F1 of their label as a detector of firing, 0 without a label",
        "token_entropy": "mean over poles that fire of the entropy, in bits, of the tokens they fire on",
    }
    out: dict[str, Any] = {}
    for name, values in (("mean_f1", scores.f1), ("token_entropy", scores.token_entropy)):
        low, high = bootstrap(values, np.mean) if n > 1 else (None, None)
        out[name] = Estimate(float(values.mean()), low, high, n, "pole", formula[name], over).row()
    what = f"share of poles that fire whose label's F1 is above {GOOD}"
    out["share_above_half"] = proportion(int((scores.f1 > GOOD).sum()), n, "pole", what).row()
    out["f1_quantiles"] = np.quantile(scores.f1, np.linspace(0, 1, QUANTILES)).round(4).tolist()
    return out


def share_reaching(quantiles: list[float], score: float) -> float:
    """The share of latents, of whose scores ``quantiles`` are evenly spaced quantiles, that have at least ``score``."""
    return float(1 - np.searchsorted(np.asarray(quantiles), score, side="left") / len(quantiles))

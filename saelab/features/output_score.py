"""Which latents write a concept: the share of what a latent promotes that falls on the concept's words.

A latent that fires on a concept need not promote its words, and one that promotes them need not fire on it (Arad et
al., 2025, arXiv 2505.20063, who score latents by what steering with them does, and not only by where they fire). The
score here is read from the feature index, without a language model; :func:`saelab.steering.choice.rank_latents`
measures the effect in the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from saelab.errors import UserError
from saelab.features.index import FeatureIndex


def output_scores(index: FeatureIndex, words: Sequence[str]) -> pd.DataFrame:
    """``latent``, ``pole`` and ``output_score`` of every (latent, pole), in the order of ``index.table()``.

    ``output_score`` is the sum of the logit changes of those promoted tokens of the index that are one of ``words``, or
    the larger part of one, over the sum of all of them: 0 where none does, 1 where all do. White space and capitals do
    not count.
    Raises UserError for an index that was made without a language model.
    """
    wanted = {word.strip().lower() for word in words if word.strip()}
    if not wanted:
        raise UserError("give at least one word of the concept")
    table = index.columns(["latent", "pole", "promoted", "promoted_logits"])
    tokens = table["promoted"].combine_chunks()
    lengths = np.asarray(tokens.value_lengths().fill_null(0))
    if not lengths.any():
        raise UserError(
            f"the index of {index.run_folder} holds no promoted tokens: it was made without a language model; "
            "run `saelab index` with --overwrite and a --model"
        )
    texts = tokens.flatten().dictionary_encode()
    told = np.array([_belongs(text, wanted) for text in texts.dictionary.to_pylist()], dtype=bool)
    logits = np.asarray(table["promoted_logits"].combine_chunks().flatten(), dtype=np.float64).clip(min=0)
    row = np.repeat(np.arange(len(lengths)), lengths)
    hit = logits * told[np.asarray(texts.indices)]
    total = np.bincount(row, logits, len(lengths))
    share = np.divide(np.bincount(row, hit, len(lengths)), total, out=np.zeros(len(lengths)), where=total > 0)
    return pd.DataFrame({"latent": table["latent"].to_numpy(), "pole": table["pole"].to_numpy(), "output_score": share})


def _belongs(token: str, words: set[str]) -> bool:
    """Whether a token is a word, or the larger part of one from its start."""
    text = token.strip().lower()
    if text in words:
        return True
    begins = len(text) >= 4 and token[:1].isspace()
    return begins and any(word.startswith(text) and len(text) >= 0.6 * len(word) for word in words)

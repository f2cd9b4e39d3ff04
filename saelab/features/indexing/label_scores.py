"""How well sets of tokens describe the latents of an SAE: the labels' scores alone, without the rest of an index."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saelab.data.cache import ActivationCache
from saelab.features.indexing.builder import Progress, corpus_vocabulary, encode_corpus
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.labels import Labeller
from saelab.features.indexing.statistics import count_tokens, token_statistics
from saelab.sae import SAE


class LabelScores(NamedTuple):
    """Columns of the feature index for the poles that fire, ``[n]`` each."""

    f1: NDArray[np.float64]  # of the label on contexts it was not chosen on; 0 where no rule is better than guessing
    token_entropy: NDArray[np.float64]  # bits, of the tokens that the pole fires on


def label_scores(
    sae: SAE, cache: ActivationCache, config: IndexConfig | None = None, progress: Progress | None = None
) -> LabelScores:
    """The scores that :func:`saelab.features.indexing.builder.build_index` would write, of every pole that fires."""
    config = config or IndexConfig()
    n_rows = min(config.max_tokens or cache.n_rows, cache.n_rows)
    report = progress or (lambda what, done, total: None)
    with tempfile.TemporaryDirectory(prefix="saelab-labels-") as name:
        corpus = Corpus(cache, Path(name) / "corpus", n_rows)
        postings, _ = encode_corpus(sae, cache, corpus, Path(name) / "codes", config, report)
        vocabulary = corpus_vocabulary(corpus, cache, None, 0).to_pylist()
        labeller = Labeller(corpus, vocabulary, config.label_sample, config.seed)
        f1, entropy = [], []
        for start, stop in postings.slot_ranges(config.chunk_entries, 2 * config.chunk_latents):
            entries = postings.entries(start, stop)
            fires = np.diff(entries.ptr) > 0
            # As in the index, so that the numbers are the same.
            columns = labeller.columns(entries, np.random.default_rng([config.seed, start]))
            f1.append(np.nan_to_num(columns["label_score"])[fires])
            pairs = count_tokens(entries.slots(), corpus.counted(entries.rows), len(vocabulary))
            entropy.append(np.asarray(token_statistics(pairs, stop - start, 1)["token_entropy"], np.float64)[fires])
            report("labels", stop // 2, sae.n_features)
        del corpus, postings, labeller
    return LabelScores(np.concatenate(f1), np.concatenate(entropy))

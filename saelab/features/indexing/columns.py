"""All columns of both tables for a range of latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from numpy.typing import NDArray

from saelab.data.cache import ActivationCache
from saelab.features import schema
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.examples import Firings, Occurrences, choose, example_table
from saelab.features.indexing.groups import named, table_rows
from saelab.features.indexing.labels import Labeller
from saelab.features.indexing.logit_lens import LogitLens, neighbours
from saelab.features.indexing.partners import Partners
from saelab.features.indexing.postings import Postings
from saelab.features.indexing.statistics import (
    Covariates,
    count_tokens,
    histogram_edges,
    magnitude_statistics,
    rank,
    token_statistics,
)
from saelab.features.indexing.words import Words
from saelab.sae import SAE
from saelab.sae.base import unit_rows

Columns = dict[str, Any]


class Describer:
    """Computes all columns for any range of slots from the corpus, the codes and the SAE."""

    def __init__(
        self,
        sae: SAE,
        cache: ActivationCache,
        corpus: Corpus,
        postings: Postings,
        config: IndexConfig,
        lens: LogitLens | None,
        vocabulary: pa.Array,
    ) -> None:
        self.corpus, self.postings, self.config = corpus, postings, config
        self.vocabulary = vocabulary
        negative = sae.signed or bool(postings.counts[1::2].any())
        self.poles = (1, -1) if negative else (1,)
        self.edges = histogram_edges(*postings.magnitude_range(), config.bins)
        self.covariates = Covariates(corpus)
        names = vocabulary.to_pylist()
        self.labeller = Labeller(corpus, names, config.label_sample, config.seed)
        self.words = Words(corpus, names, config.label_sample, config.words, config.seed)
        self.occurrences = Occurrences(corpus)
        self.partners = Partners(postings, config.partner_sample, config.partners)
        # Products of all latents with all tokens of the vocabulary, and with all latents, are made where the SAE is.
        self.W_dec = sae.directions.detach().float()
        self.unit = unit_rows(self.W_dec)
        self.lens = None if lens is None else lens.to(sae.device)
        self.weights = _weights(sae)
        mean = torch.tensor(cache.goal.manifest.mean, dtype=torch.float64)  # whose square may exceed float32
        self.mean_direction = unit_rows(mean[None])[0].to(sae.device, torch.float32)

    def tables(self, start: int, stop: int) -> tuple[pa.Table, pa.Table]:
        """``features.parquet`` and ``examples.parquet`` rows of slots ``start .. stop`` (whole latents)."""
        entries, rng = self.postings.entries(start, stop), np.random.default_rng([self.config.seed, start])
        slots, n = entries.slots(), stop - start
        ranked = rank(entries, slots)
        columns: Columns = {
            "latent": np.arange(start, stop) // 2,
            "pole": 1 - 2 * (np.arange(start, stop) % 2),
            **magnitude_statistics(entries, slots, ranked, self.corpus.n_rows, self.edges),
            **self._tokens(entries.rows, slots, n),
            **self.covariates.correlate(entries, slots),
            **self._directions(start // 2, stop // 2),
            **self.labeller.columns(entries, rng),
            **self.partners.columns(entries, start, rng),
            **self.words.columns(entries, start),
        }
        firings = Firings.of(entries, slots, self.corpus)
        chosen = choose(firings, slots, ranked, len(self.poles), self.config, rng, self.occurrences)
        windows = example_table(chosen, firings, start, self.vocabulary, self.config)
        kinds = {name: kind for name, (kind, _) in schema.FEATURE_COLUMNS.items()}
        keep = np.arange(0, n, 3 - len(self.poles))
        arrays = [pa.array(columns[name]).cast(kind).take(pa.array(keep)) for name, kind in kinds.items()]
        table = pa.table(arrays, names=list(kinds))
        if len(self.poles) == 1:
            windows = windows.filter(pa.array(windows["pole"].to_numpy() == 1))
        return table, windows.cast(schema.arrow_schema(schema.EXAMPLE_COLUMNS))

    def _tokens(self, rows: NDArray[np.int64], slots: NDArray[np.int64], n: int) -> Columns:
        pairs = count_tokens(slots, self.corpus.counted(rows), len(self.vocabulary))
        columns = token_statistics(pairs, n, self.config.top_tokens)
        return columns | {"top_tokens": named(columns["top_tokens"], self.vocabulary)}

    def _directions(self, first: int, last: int) -> Columns:
        """Columns that come from the weights: norms, logit effects, neighbours. One row per pole of each latent."""
        W = self.W_dec[first:last]
        columns: Columns = {name: np.repeat(values[first:last], 2) for name, values in self.weights.items()}
        cosine = self.unit[first:last] @ self.mean_direction
        columns["mean_cosine"] = (cosine.cpu()[:, None] * torch.tensor([1.0, -1.0])).reshape(-1).numpy()
        cosines, close = neighbours(self.unit, first, last, self.config.neighbours, len(self.poles) == 2)
        columns["neighbours"] = table_rows(np.repeat(close.cpu().numpy(), 2, axis=0))
        columns["neighbour_cosines"] = table_rows(np.repeat(cosines.cpu().numpy(), 2, axis=0))
        names = [f"{side}{part}" for side in ("promoted", "suppressed") for part in ("", "_ids", "_logits")]
        if self.lens is None:
            return columns | {name: [[]] * (2 * (last - first)) for name in names}
        up, down = self.lens.extremes(W, self.config.tokens)
        for side, (values, ids), (other, other_ids) in (("promoted", up, down), ("suppressed", down, up)):
            # A negative activation suppresses what a positive one promotes, by the same amount.
            logits = rearrange([values, -other], "pole latent token -> (latent pole) token").cpu().numpy()
            tokens = rearrange([ids, other_ids], "pole latent token -> (latent pole) token").cpu().numpy()
            columns[f"{side}_logits"], columns[f"{side}_ids"] = table_rows(logits), table_rows(tokens)
            columns[side] = named(columns[f"{side}_ids"], self.vocabulary)
        return columns


def _weights(sae: SAE) -> dict[str, NDArray[np.float32]]:
    """Norms and biases per latent; NaN where the variant has no such parameter."""
    missing = np.full(sae.n_features, np.nan, np.float32)
    parameters = dict(sae.reader.named_parameters())
    encoder, bias = parameters.get("W_enc"), parameters.get("b_enc")
    return {
        "encoder_norm": missing if encoder is None else encoder.detach().float().norm(dim=0).cpu().numpy(),
        "encoder_bias": missing if bias is None else bias.detach().float().cpu().numpy(),
        "decoder_norm": sae.directions.detach().float().norm(dim=1).cpu().numpy(),
    }

"""The two tables of a feature index, and what one example is.

Activation statistics of a (latent, pole) are magnitudes ``|value|`` in raw units: the activation is ``pole`` times
the magnitude. Activations in examples are signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

VERSION = 1
META_KEY = b"saelab.features"
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}

_INTS, _FLOATS, _STRINGS = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.string())

# column -> (type, what it says); the descriptions travel in the file's metadata
FEATURE_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "latent": (pa.int32(), "latent number"),
    "pole": (pa.int8(), "+1: positive activations, -1: negative activations of a signed SAE"),
    "count": (pa.int64(), "tokens on which it fires (value != 0 with this sign)"),
    "density": (pa.float64(), "count / indexed tokens"),
    "max": (pa.float32(), "largest magnitude; 0 where it never fires"),
    "mean": (pa.float32(), "mean magnitude over the tokens on which it fires"),
    **{name: (pa.float32(), f"{q:.0%} quantile of the magnitude over firing tokens") for name, q in QUANTILES.items()},
    "histogram": (pa.list_(pa.int64()), "firing tokens per magnitude bin; edges in the metadata"),
    "token_entropy": (pa.float32(), "entropy in bits of the token it fires on"),
    "token_share": (pa.float32(), "share of firings on its most frequent token"),
    "top_tokens": (_STRINGS, "most frequent tokens it fires on; a part of a character counts as the character"),
    "top_token_counts": (_INTS, "firings on each of them"),
    "words": (_STRINGS, "whole words of the text that its firings stand in, by magnitude"),
    "word_shares": (_FLOATS, "share of its magnitude on each of them, of a sample of its firings"),
    "position_corr": (pa.float32(), "Pearson correlation of the magnitude with the position in the context"),
    "frequency_corr": (pa.float32(), "Pearson correlation of the magnitude with log(count of the token in the corpus)"),
    "first_corr": (pa.float32(), "Pearson correlation of the magnitude with being a context's first indexed token"),
    "norm_corr": (pa.float32(), "Pearson correlation of the magnitude with the activation's norm"),
    "mean_cosine": (pa.float32(), "cosine of pole x decoder row with the mean activation"),
    "encoder_norm": (pa.float32(), "norm of the encoder column; NaN for an SAE without one"),
    "encoder_bias": (pa.float32(), "encoder bias; NaN for an SAE without one"),
    "decoder_norm": (pa.float32(), "norm of the decoder row"),
    "label": (pa.string(), "offline label; empty where none was found"),
    "label_score": (pa.float32(), "F1 of the label as a detector of firing, on contexts it was not chosen on"),
    "label_precision": (pa.float32(), "precision of the same detection"),
    "label_recall": (pa.float32(), "recall of the same detection"),
    "label_mass": (pa.float32(), "share of the magnitude that it meets, on the same contexts"),
    "promoted": (_STRINGS, "tokens whose logits pole x decoder row raises most"),
    "promoted_ids": (_INTS, "their ids"),
    "promoted_logits": (_FLOATS, "logit change per unit of activation, minus its mean over the vocabulary"),
    "suppressed": (_STRINGS, "tokens whose logits it lowers most"),
    "suppressed_ids": (_INTS, "their ids"),
    "suppressed_logits": (_FLOATS, "logit change per unit of activation, minus its mean over the vocabulary"),
    "neighbours": (_INTS, "latents with the closest decoder rows (largest |cosine| where the SAE is signed)"),
    "neighbour_cosines": (_FLOATS, "their cosines"),
    "partners": (_INTS, "latents that fire on the same tokens: best by Jaccard index, then best by PMI"),
    "partner_poles": (pa.list_(pa.int8()), "their poles"),
    "partner_jaccard": (_FLOATS, "tokens on which both fire / tokens on which either fires"),
    "partner_pmi": (_FLOATS, "log2 P(both) / (P(this) P(partner))"),
}
EXAMPLE_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "latent": (pa.int32(), "latent number"),
    "pole": (pa.int8(), "+1 or -1"),
    "kind": (
        pa.string(),
        "top, a quantile band (q00: lowest quarter, q25, q50, q75), random, silent, or hard (silent on a token of a "
        "strong firing)",
    ),
    "rank": (pa.int16(), "order within the kind; top: by magnitude"),
    "row": (pa.int64(), "row of the focus token in the cache"),
    "document": (pa.int32(), "its document"),
    "value": (pa.float32(), "signed activation at the focus token"),
    "tokens": (_INTS, "token ids of the window"),
    "strings": (
        _STRINGS,
        "the same tokens as text; a character spread over several tokens is shown with the last of them",
    ),
    "activations": (_FLOATS, "signed activation at each; 0 also where the cache holds no row (skipped positions)"),
    "focus": (pa.int16(), "position of the focus token in the window"),
    "role": (pa.string(), "of a chat: whose message the focus token belongs to (user, assistant, ...); else text"),
}


def arrow_schema(columns: dict[str, tuple[pa.DataType, str]]) -> pa.Schema:
    """The schema of a table from its columns."""
    return pa.schema([(name, kind) for name, (kind, _) in columns.items()])


@dataclass(frozen=True)
class Example:
    """A token window from the corpus, and a latent's activation on each of its tokens."""

    latent: int
    pole: int
    kind: str
    rank: int
    row: int
    document: int
    value: float
    tokens: list[int]
    strings: list[str]
    activations: list[float]
    focus: int
    role: str = "text"  # indexes of 0.1.0 have none

    @property
    def text(self) -> str:
        """The window as one string."""
        return "".join(self.strings)

    def shown_at(self, place: int) -> int:
        """Where a token is to be seen: a part of a character is shown with the token that completes it."""
        later = (p for p in range(place, len(self.strings)) if self.strings[p])
        return next(later, place)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Example:
        """From a row of ``examples.parquet``."""
        return cls(**{name: row[name] for name in EXAMPLE_COLUMNS if name in row})

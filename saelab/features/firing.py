"""Where a latent fires, in one line."""

from __future__ import annotations

from saelab.features.index import FeatureIndex

SHOWN = 5  # tokens


def where_it_fires(index: FeatureIndex | None, latent: int, pole: int = 1) -> str:
    """How often and on what a latent fires in the corpus of its index."""
    if index is None:
        return "its feature index would say where it fires: saelab index RUN --cache CACHE"
    row = index.latent(latent, pole if pole in index.poles else 1)
    if not row["count"]:
        return f"it fired on none of the {index.meta['tokens']:,} tokens of its index: it is dead"
    tokens = ", ".join(f"‘{token}’" for token in list(dict.fromkeys(t.strip() or t for t in row["top_tokens"]))[:SHOWN])
    return f"in its index it fires on {row['density']:.3%} of all tokens, most often on {tokens}"

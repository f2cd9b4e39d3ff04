"""The settings of an index; the command line shows the same names and defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields

from saelab.errors import UserError

# May be 0: then that part of the index stays empty.
OPTIONAL = (
    *("top", "band", "random", "silent", "hard", "before", "after"),
    *("tokens", "top_tokens", "words", "neighbours", "partners", "seed"),
)


@dataclass(frozen=True)
class IndexConfig:
    """The content of an index, and how much memory its building may take."""

    top: int = 16
    """Windows of the largest activations, one per context."""
    band: int = 4
    """Windows sampled from each quarter of the activations."""
    random: int = 8
    """Windows sampled from all activations."""
    silent: int = 8
    """Windows in which the latent does not fire: the negative examples of detection scores."""
    hard: int = 6
    """Silent windows around a token that the latent fires on strongly elsewhere: what an explanation must rule out."""
    before: int = 24
    """Tokens in a window before the focus token."""
    after: int = 8
    """Tokens in a window after the focus token."""
    bins: int = 40
    """Bins of the magnitude histograms."""
    tokens: int = 10
    """Promoted and suppressed tokens."""
    top_tokens: int = 8
    """Most frequent tokens listed."""
    words: int = 16
    """Words listed with their shares of the latent's magnitude."""
    neighbours: int = 10
    """Decoder neighbours listed."""
    partners: int = 6
    """Co-activation partners listed by Jaccard index, and as many again by PMI."""
    partner_sample: int = 256
    """Firings of a latent in which its partners are counted."""
    label_sample: int = 1024
    """Firings of a latent on which its offline label is chosen and scored, half of them each."""
    batch_size: int = 4096
    """Tokens encoded at once; wide SAEs take fewer."""
    max_tokens: int | None = None
    """Index only the first rows of the cache."""
    seed: int = 0
    """Seed of the sampled examples."""
    run_entries: int = 1 << 22
    """Active latents x tokens held in memory before they are written to disk."""
    chunk_entries: int = 1 << 21
    """Firings processed at once; a latent with more is processed alone."""
    chunk_latents: int = 512
    """Latents processed at once."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(IndexConfig)):
            value, least = getattr(self, name), 0 if name in OPTIONAL else 1
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")

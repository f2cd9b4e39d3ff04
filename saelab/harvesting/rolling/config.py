"""The settings of a rolling cache, and the sizes that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from saelab.errors import UserError
from saelab.harvesting.config import HarvestConfig

LEAST_WINDOW = 1 << 16  # tokens; a smaller one must be asked for
WINDOW = 1 << 19  # tokens
GB = 10**9


@dataclass(frozen=True)
class RollingConfig(HarvestConfig):
    """What to run, how much to train on, and how much of the disk to take."""

    tokens: int = 10_000_000
    """Activations to train on. A text that ends earlier is begun again."""
    cache_gb: float = 10.0
    """Most of the disk that the cache takes at any time, in units of 10^9 bytes."""
    window_tokens: int | None = None
    """Tokens of text that are shuffled together; by default a twentieth of `tokens`, 524,288 where that is more, and
    never more than half of the disk allows."""
    sample_tokens: int | None = None
    """Tokens of the first documents of the text, which are kept and not trained on: scale, mean and variance,
    initialisation and thresholds are taken from them. By default an eighth of `tokens`, between 32,768 and 131,072."""
    held_out_tokens: int | None = None
    """Tokens of the documents after the sample, which are kept to measure on and never trained on; by default a
    twentieth of `tokens`, between 16,384 and 1,048,576."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = {field.name: field.default for field in fields(HarvestConfig)}
        if self.held_out != shares["held_out"]:
            raise UserError(f"held_out={self.held_out} is a share of a whole cache; give a rolling one held_out_tokens")
        if not 0 < self.cache_gb < math.inf:
            raise UserError(f"cache_gb={self.cache_gb} must be above 0")
        for name, least in (("window_tokens", 1), ("sample_tokens", 1), ("held_out_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")

    @property
    def limit(self) -> int:
        """Most bytes on disk."""
        return int(self.cache_gb * GB)

    @property
    def pass_size(self) -> int:
        """Tokens of text in a whole forward pass."""
        return self.pass_contexts * self.context_length

    def kept_passes(self) -> tuple[int, int]:
        """Forward passes of the sample and of the held-out documents."""
        sample, held_out = self.sample_tokens, self.held_out_tokens
        if sample is None:
            sample = min(max(self.tokens // 8, 1 << 15), 1 << 17)
        if held_out is None:
            held_out = min(max(self.tokens // 20, 1 << 14), 1 << 20)
        return math.ceil(sample / self.pass_size), math.ceil(held_out / self.pass_size)

    def kept(self) -> HarvestConfig:
        """How the kept cache is harvested: its last documents are the held-out ones."""
        own = {field.name: getattr(self, field.name) for field in fields(HarvestConfig)}
        sample, held_out = self.kept_passes()
        total = sample + held_out
        return HarvestConfig(**{**own, "tokens": total * self.pass_size, "held_out": held_out / total})

    def bytes_of(self, passes: int, d_in: int, shards: int = 1) -> int:
        """Most bytes that the activations of ``passes`` take on disk in so many shards, with what is beside them."""
        vector = d_in * getattr(torch, self.dtype).itemsize * (1 + self.gradients)
        # Beside a row: its token and its place; beside a token: itself, its document and its role.
        token = vector + 4 + 4 + 4 + 4 + 1
        # Sums and a header in each shard; up to three copies of the manifest while it is being written.
        beside = shards * (8 * d_in + 2 * BLOCK) + 3 * (32 * d_in + 2 * BLOCK + 320 * shards)
        return passes * self.pass_size * token + beside

    def window(self, d_in: int, kept_bytes: int, found: int | None = None) -> Window:
        """The sizes of a segment, beside ``kept_bytes``. Raises UserError where two do not fit.

        ``found`` are the passes of a window that was begun with.
        """
        need = math.ceil(self.tokens / max(self.pass_contexts * (self.context_length - self.skip_first), 1))
        asked = self.window_tokens or min(LEAST_WINDOW, self.tokens)
        least = found or min(max(math.ceil(asked / self.pass_size), 1), need)
        beside = kept_bytes + max(RECORD, SEGMENT_RECORD * math.ceil(need / least))
        room, one = self.limit - beside, self._sized(least, d_in)
        if 2 * one.bytes > room:
            wanted = math.ceil((2 * one.bytes + beside) / GB * 1e4) / 1e4
            smaller = "--window-tokens" if self.window_tokens else "--sample-tokens and --held-out-tokens"
            raise UserError(
                f"cache_gb={self.cache_gb:g} cannot hold two shuffle windows of {least * self.pass_size:,} tokens "
                f"({one.bytes / GB:.2g} GB each) beside the kept documents ({kept_bytes / GB:.2g} GB); give "
                f"--cache-gb {wanted:g}, or a smaller {smaller}"
            )
        if found or self.window_tokens:
            return one
        best = min(max(math.ceil(max(self.tokens // 20, WINDOW) / self.pass_size), 1), need)
        while best > least and 2 * self._sized(best, d_in).bytes > room:
            best = max(min(best - 1, int(best * room / (2 * self._sized(best, d_in).bytes))), least)
        return self._sized(best, d_in)

    def _sized(self, passes: int, d_in: int) -> Window:
        in_shard = min(self.shard_passes(d_in), passes)
        return Window(passes, in_shard, self.bytes_of(passes, d_in, math.ceil(passes / in_shard)))


BLOCK = 4096  # bytes: files take whole blocks of the disk
RECORD = 1 << 16  # least bytes for the list of the segments
SEGMENT_RECORD = 400  # bytes of it for each, twice: what is replaced is there while the list is written


@dataclass(frozen=True)
class Window:
    """What is shuffled together: the rows of so many forward passes, in a segment of the disk."""

    passes: int
    shard_passes: int  # that make up a shard
    bytes: int  # that a segment takes at most

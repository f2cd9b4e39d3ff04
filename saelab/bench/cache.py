"""How fast a cache is read: ``python -m saelab.bench.cache``.

Writes a cache, then reads it alternately with token-level shuffling, in corpus order, and as a plain copy of its files
(the limit of the memory). GB/s count bytes on disk; batches are float32. GB per CPU second is the rate of one core
alone; unlike GB/s it also holds on a busy machine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.data.cache.reader import WINDOW_BYTES, ActivationCache


def make(folder: Path, rows: int, d_in: int, dtype: str) -> ActivationCache:
    acts = torch.randn(1 << 14, d_in).repeat(-(-rows // (1 << 14)), 1)[:rows]
    return ActivationCache.from_tensors(folder, acts, dtype=dtype, shard_rows=1 << 16, held_out=0)


@dataclass(frozen=True)
class Settings:
    """What to read, and how often."""

    rows: int = 500_000
    """Rows of the cache."""
    d_in: int = 576
    """Width of a row."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """How activations are stored."""
    batch_size: int = 2048
    """Rows per batch."""
    window_bytes: int = WINDOW_BYTES
    """Memory for shuffling."""
    rounds: int = 5
    """Times each way is timed."""
    out: Path | None = None
    """JSON file to write."""


def compare(settings: Settings) -> dict[str, tuple[float, float]]:
    """GB/s and GB per CPU second of each way of reading: medians over the rounds."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary) / "cache", settings.rows, settings.d_in, settings.dtype)
        cache = ActivationCache(Path(temporary) / "cache", window_bytes=settings.window_bytes)
        gigabytes = settings.rows * settings.d_in * getattr(torch, settings.dtype).itemsize / 1e9

        def read(seed: int | None) -> None:
            for _ in cache.batches(settings.batch_size, seed=seed):
                pass

        def copy() -> None:
            for index in range(len(cache.manifest.shards)):
                cache.shards.columns(index)["acts"].all().clone()

        jobs: dict[str, Callable[[], None]] = {
            "shuffled": lambda: read(0),
            "corpus order": lambda: read(None),
            "plain copy": copy,
        }
        clock.rounds(jobs, settings.rounds)  # the turn before brings the file into the page cache and maps it
    return {name: (gigabytes / clock.median(name).wall, gigabytes / clock.median(name).cpu) for name in jobs}


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = command.options(Settings, "cache", __doc__, args)
    found = compare(settings)
    for name, (wall, cpu) in found.items():
        sys.stdout.write(f"{name:<14} {wall:6.2f} GB/s {cpu:6.2f} GB per CPU second\n")
    write_out(settings.out, {name: {"GB/s": wall, "GB per CPU second": cpu} for name, (wall, cpu) in found.items()})


if __name__ == "__main__":
    command.run(main)

"""How fast a cache is read: ``python -m saelab.bench.cache``.

Writes a cache, then reads it in turns with token-level shuffling, in corpus order, and as a plain copy of its files
(what the memory can do). GB/s count bytes on disk; batches come out as float32. GB per CPU second is what one core
would do alone: it holds on a busy machine, where the other column does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from saelab.data.cache.reader import WINDOW_BYTES, ActivationCache


def make(folder: Path, rows: int, d_in: int, dtype: str) -> ActivationCache:
    acts = torch.randn(1 << 14, d_in).repeat(-(-rows // (1 << 14)), 1)[:rows]
    return ActivationCache.from_tensors(folder, acts, dtype=dtype, shard_rows=1 << 16, held_out=0)


def timed(job: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and seconds of processor time over all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - start, time.process_time() - cpu


def compare(
    rows: int, d_in: int, dtype: str, batch_size: int, window_bytes: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """GB/s and GB per CPU second of each way of reading: medians over the rounds."""
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary) / "cache", rows, d_in, dtype)
        cache = ActivationCache(Path(temporary) / "cache", window_bytes=window_bytes)
        gigabytes = rows * d_in * getattr(torch, dtype).itemsize / 1e9

        def read(seed: int | None) -> None:
            for _ in cache.batches(batch_size, seed=seed):
                pass

        def copy() -> None:
            for index in range(len(cache.manifest.shards)):
                cache.shards.columns(index)["acts"].all().clone()

        jobs: dict[str, Callable[[], None]] = {
            "shuffled": lambda: read(0),
            "corpus order": lambda: read(None),
            "plain copy": copy,
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, job in jobs.items():
                times[name].append(timed(job))
    # The first round brings the file into the page cache and maps it.
    columns = {name: list(zip(*found[1:])) for name, found in times.items()}
    return {name: tuple(gigabytes / statistics.median(c) for c in found) for name, found in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m saelab.bench.cache", description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the cache")
    parser.add_argument("--d-in", type=int, default=576, help="width of a row")
    parser.add_argument("--dtype", default="float16", help="float32, float16 or bfloat16")
    parser.add_argument("--batch-size", type=int, default=2048, help="rows per batch")
    parser.add_argument("--window-bytes", type=int, default=WINDOW_BYTES, help="memory for shuffling")
    parser.add_argument("--rounds", type=int, default=6, help="times each way is run, the first not counted")
    options = parser.parse_args()
    found = compare(options.rows, options.d_in, options.dtype, options.batch_size, options.window_bytes, options.rounds)
    for name, (wall, cpu) in found.items():
        sys.stdout.write(f"{name:<14} {wall:6.2f} GB/s {cpu:6.2f} GB per CPU second\n")


if __name__ == "__main__":
    main()

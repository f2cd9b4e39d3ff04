"""Speed and memory of the feature index: ``python -m saelab.bench.features [--latents 16384 --tokens 1000000]``.

Builds an index over planted activations (in a subprocess whose peak memory is read), prints its share of the encode
throughput, then opens latents and filters a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.features.index import FeatureIndex
from saelab.features.indexing.builder import build_index
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.logit_lens import LogitLens
from saelab.sae import build
from saelab.sparse import SparseCode

VOCAB, CONTEXT = 32_768, 128


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=576, help="d_in; the default is that of SmolLM2")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--variant", default="topk")
    parser.add_argument("--rows", type=int, default=65_536, help="latents of the table that is filtered")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        _build(options)
        return
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as name:
        _cache(Path(name), options)
        built = subprocess.run(
            [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--folder", name], capture_output=True
        )  # pyright: ignore
        sys.stderr.buffer.write(built.stderr)
        figures = json.loads(built.stdout) | _open(Path(name) / "run") | _filter(options.rows)
    console.print_json(json.dumps(figures))


def _cache(folder: Path, options: argparse.Namespace) -> None:
    """Activations around a planted dictionary, in float16, with Zipf-distributed tokens."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2048, options.width, generator=generator), dim=1)
    n = options.tokens - options.tokens % CONTEXT
    acts = torch.empty(n, options.width, dtype=torch.float16)
    for part in torch.arange(n).split(1 << 16):
        picked = (torch.rand(len(part), 8, generator=generator) ** 3 * 2048).long()
        size = torch.rand(len(part), 8, 1, generator=generator) * 4
        acts[part] = ((directions[picked] * size).sum(1) + 0.3 * torch.randn(len(part), options.width)).half()
    tokens = (torch.rand(n, generator=generator) ** 6 * VOCAB).long()
    ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT, dtype="float16")


def _build(options: argparse.Namespace) -> None:
    """In its own process: build the index, print seconds and peak memory as JSON."""
    torch.manual_seed(0)
    sae = build(options.variant, d_in=options.width, d_sae=options.latents, k=options.k).eval()
    cache = ActivationCache(options.folder / "cache")
    before, encode, cpu = _peak(), sae.encode, [0.0]

    def timed(*args: Tensor) -> SparseCode:
        tick = time.process_time()
        code = encode(*args)
        cpu[0] += time.process_time() - tick
        return code

    sae.encode = timed  # pyright: ignore[reportAttributeAccessIssue]
    started = time.process_time()
    lens = LogitLens(torch.randn(options.width, VOCAB))
    index = build_index(sae, cache, options.folder / "run", lens=lens, token_strings=[f" t{i}" for i in range(VOCAB)])
    total, seconds, encoding = time.process_time() - started, index.meta["seconds"], index.meta["encode_seconds"]
    figures = {
        "variant": options.variant,
        "latents": options.latents,
        "tokens": index.meta["tokens"],
        "d_in": options.width,
        "k": options.k,
        "encode_seconds": round(encoding, 1),
        "index_seconds": round(seconds, 1),
        "share_of_encode_throughput": round(encoding / seconds, 3),
        "encode_cpu_seconds": round(cpu[0], 1),
        "index_cpu_seconds": round(total, 1),
        "share_by_cpu_time": round(cpu[0] / total, 3),
        "peak_memory_MB": round(_peak()),
        "of_which_before_MB": round(before),
        "index_MB": round(sum(f.stat().st_size for f in index.folder.iterdir()) / 2**20),
        "default_batch": IndexConfig().batch_size,
    }
    sys.stdout.write(json.dumps(figures))


def _peak() -> float:
    """Largest resident memory of this process so far, in MB; mapped files count while they are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel does not tell this process's peak memory")


def _open(folder: Path) -> dict[str, float]:
    """Seconds to open an index and read one latent's page: the median and the worst of 50, each from the start."""
    times = []
    for latent in np.random.default_rng(0).integers(0, FeatureIndex(folder).d_sae, 50):
        started = time.perf_counter()
        index = FeatureIndex(folder)
        index.latent(int(latent))
        index.examples(int(latent))
        times.append(time.perf_counter() - started)
    return {"page_seconds_median": round(float(np.median(times)), 4), "page_seconds_worst": round(max(times), 4)}


def _filter(rows: int) -> dict[str, float]:
    """Seconds to read a table of ``rows`` latents, and to filter and sort it."""
    with tempfile.TemporaryDirectory() as name:
        sae = build("topk", d_in=8, d_sae=rows, k=4).eval()
        tokens = torch.randint(0, 100, (2048,))
        cache = ActivationCache.from_tensors(Path(name) / "cache", torch.randn(2048, 8), tokens, context_length=CONTEXT)
        config = IndexConfig(top=1, band=0, random=0, silent=0, chunk_latents=4096)
        index = build_index(sae, cache, Path(name) / "run", token_strings=[f" t{i}" for i in range(100)], config=config)
        started = time.perf_counter()
        index.table()
        read = time.perf_counter() - started
        started = time.perf_counter()
        table = index.table()
        hit = (table["density"] > 1e-4) & (table["density"] < 0.1) & table["label"].str.contains("t1", regex=False)
        table.loc[hit | (table["token_entropy"] < 3)].sort_values(by="max", ascending=False)  # pyright: ignore
        filtered = time.perf_counter() - started
    return {"table_latents": rows, "table_read_seconds": round(read, 3), "table_filter_seconds": round(filtered, 3)}


if __name__ == "__main__":
    main()

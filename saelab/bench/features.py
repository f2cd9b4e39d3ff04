"""Speed and memory of the feature index: ``python -m saelab.bench.features [--latents 16384 --tokens 1000000]``.

Encodes half of the batches of planted activations, builds an index over all of them, and encodes the other half, in a
subprocess whose peak memory is read; prints the share of the time that encoding takes, then opens latents and filters
a table. Processor time holds also where other programs compete for the cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from saelab.bench import command
from saelab.bench.timing import Clock, write_out
from saelab.data.cache import ActivationCache
from saelab.features.index import FeatureIndex
from saelab.features.indexing.builder import batch_rows, build_index
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.logit_lens import LogitLens
from saelab.sae import build

VOCAB, CONTEXT = 32_768, 128


@dataclass(frozen=True)
class Settings:
    """Sizes; the defaults are those of docs/benchmarks.md."""

    latents: int = 16_384
    """Latents of the SAE whose index is built."""
    tokens: int = 1_000_000
    """Tokens of the planted cache."""
    width: int = 576
    """d_in; the default is that of SmolLM2."""
    k: int = 32
    """Latents per token."""
    variant: str = "topk"
    """Variant of the SAE."""
    rows: int = 65_536
    """Latents of the table that is filtered."""
    pages: int = 50
    """Latents that are opened."""
    out: Path | None = None
    """JSON file to write."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = command.options(Settings, "features", __doc__, args)
    with tempfile.TemporaryDirectory() as name:
        _cache(Path(name), settings)
        values = json.dumps(asdict(settings) | {"out": None})
        code = "from saelab.bench.features import build_in, command; command.run(build_in)"
        child = [sys.executable, "-c", code, name, values]
        built = subprocess.run(child, stdout=subprocess.PIPE)
        if built.returncode:
            sys.exit(built.returncode)  # it has said why
        found = json.loads(built.stdout) | _open(Path(name) / "run", settings.pages) | _filter(settings.rows)
    write_out(settings.out, found)
    Console(highlight=False).print_json(data=found)


def _cache(folder: Path, settings: Settings) -> None:
    """Activations around a planted dictionary, in float16, with Zipf-distributed tokens."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2048, settings.width, generator=generator), dim=1)
    n = settings.tokens - settings.tokens % CONTEXT
    acts = torch.empty(n, settings.width, dtype=torch.float16)
    for part in torch.arange(n).split(1 << 16):
        picked = (torch.rand(len(part), 8, generator=generator) ** 3 * 2048).long()
        size = torch.rand(len(part), 8, 1, generator=generator) * 4
        acts[part] = ((directions[picked] * size).sum(1) + 0.3 * torch.randn(len(part), settings.width)).half()
    tokens = (torch.rand(n, generator=generator) ** 6 * VOCAB).long()
    ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT, dtype="float16")


def build_in() -> None:
    """In its own process: build the index in the folder named first, print seconds and peak memory as JSON."""
    folder, settings = Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
    torch.manual_seed(0)
    sae = build(settings.variant, d_in=settings.width, d_sae=settings.latents, k=settings.k).eval()
    cache, clock = ActivationCache(folder / "cache"), Clock()
    before = _peak()

    def work() -> FeatureIndex:
        lens, strings = LogitLens(torch.randn(settings.width, VOCAB)), [f" t{i}" for i in range(VOCAB)]
        return build_index(sae, cache, folder / "run", lens=lens, token_strings=strings)

    def encode(first: int) -> None:
        for number, batch in enumerate(cache.head(cache.n_rows, batch_rows(sae, IndexConfig()))):
            if number % 2 == first:
                clock.time("encode", lambda acts=batch.acts: sae.encode(acts))

    with torch.no_grad(), sae.evaluating():
        sae.encode(next(iter(cache.head(256, 256))).acts)  # compiled kernels are read from disk
        encode(0)
        index = clock.time("index", work)
        encode(1)
    encoding, total = clock.total("encode"), clock.total("index")
    figures = {
        "variant": settings.variant,
        "latents": settings.latents,
        "tokens": index.meta["tokens"],
        "d_in": settings.width,
        "k": settings.k,
        "encode_seconds": round(encoding.wall, 1),
        "index_seconds": round(total.wall, 1),
        "share_of_encode_throughput": round(encoding.wall / total.wall, 3),
        "encode_cpu_seconds": round(encoding.cpu, 1),
        "index_cpu_seconds": round(total.cpu, 1),
        "share_by_cpu_time": round(encoding.cpu / total.cpu, 3),
        "peak_memory_MB": round(_peak()),
        "of_which_before_MB": round(before),
        "index_MB": round(sum(f.stat().st_size for f in index.folder.iterdir()) / 2**20),
        "default_batch": IndexConfig().batch_size,
    }
    sys.stdout.write(json.dumps(figures))


def _peak() -> float:
    """Largest resident memory of this process so far, in MB; mapped files count while they are in memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel does not tell this process's peak memory")


def _open(folder: Path, pages: int) -> dict[str, float]:
    """Seconds to open an index and read one latent's page: median and worst of ``pages``, each from the start."""
    clock = Clock()

    def page(latent: int) -> None:
        index = FeatureIndex(folder)
        index.latent(latent)
        index.examples(latent)

    for latent in np.random.default_rng(0).integers(0, FeatureIndex(folder).d_sae, pages).tolist():
        clock.time("page", lambda latent=latent: page(latent))
    worst = max(seconds.wall for seconds in clock.times["page"])
    return {"page_seconds_median": round(clock.median("page").wall, 4), "page_seconds_worst": round(worst, 4)}


def _filter(rows: int) -> dict[str, float]:
    """Seconds to read a table of ``rows`` latents, and to filter and sort it."""
    with tempfile.TemporaryDirectory() as name:
        sae = build("topk", d_in=8, d_sae=rows, k=4).eval()
        tokens = torch.randint(0, 100, (2048,))
        cache = ActivationCache.from_tensors(Path(name) / "cache", torch.randn(2048, 8), tokens, context_length=CONTEXT)
        config = IndexConfig(top=1, band=0, random=0, silent=0, chunk_latents=4096)
        index = build_index(sae, cache, Path(name) / "run", token_strings=[f" t{i}" for i in range(100)], config=config)

        def filtered() -> None:
            table = index.table()
            hit = (table["density"] > 1e-4) & (table["density"] < 0.1) & table["label"].str.contains("t1", regex=False)
            table.loc[hit | (table["token_entropy"] < 3)].sort_values(by="max", ascending=False)  # pyright: ignore

        clock = Clock()
        clock.time("read", index.table)
        clock.time("filter", filtered)
    seconds = {name: round(clock.total(name).wall, 3) for name in ("read", "filter")}
    return {"table_latents": rows, "table_read_seconds": seconds["read"], "table_filter_seconds": seconds["filter"]}


if __name__ == "__main__":
    command.run(main)

"""Building a feature index: one pass over the cache for all latents, then every latent from its own firings."""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features import schema
from saelab.features.index import FeatureIndex
from saelab.features.indexing.columns import Describer
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.logit_lens import LogitLens
from saelab.features.indexing.postings import Postings, PostingsWriter
from saelab.files import new_folder
from saelab.harvesting.background import Background
from saelab.kernels import default_precision
from saelab.layout import EXAMPLES, FEATURES, INDEX
from saelab.lm.record import ModelRecord
from saelab.sae import SAE
from saelab.sparse import SparseCode
from saelab.training.config import check_target
from saelab.vocabulary import Vocabulary

Progress = Callable[[str, int, int], None]  # stage, done, total
PRE_ACTS = 1 << 25  # pre-activations computed at once: 128 MiB of them
WORKERS = 4  # ranges of latents described at a time: each holds its entries in memory
RELEASE_EVERY = 32  # batches after which the mapped pages of the cache are released


def build_index(
    sae: SAE,
    cache: ActivationCache,
    folder: Path | str,
    *,
    lens: LogitLens | None = None,
    token_strings: Sequence[str] | None = None,
    config: IndexConfig | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> FeatureIndex:
    """Index all latents of ``sae`` (raw units) over ``cache`` into ``folder/features``.

    The cache is encoded once, in corpus order; the codes go to a temporary folder beside the index (about 16 bytes per
    active latent and token) and memory stays bounded whatever the length of the corpus. Without ``lens`` the logit
    columns are empty, and the metadata say so; ``token_strings[id]`` is the text of a token id, by default taken from
    the cache. The index appears only when it is complete: a killed build leaves the old one, or none.

    Raises UserError when an index exists and ``overwrite`` is not set, or the cache does not fit the SAE.
    """
    config, folder = config or IndexConfig(), Path(folder)
    report = progress or (lambda stage, done, total: None)
    if cache.d_in != sae.d_in:
        raise UserError(f"the SAE reads d_in={sae.d_in}, {cache.path} holds d_in={cache.d_in}; use the cache it saw")
    check_target(sae, cache)
    if (folder / INDEX).exists() and not overwrite:
        raise UserError(f"{folder / INDEX} exists; add --overwrite to replace it")
    n_rows = cache.n_rows if config.max_tokens is None else min(config.max_tokens, cache.n_rows)
    with new_folder(folder / INDEX, overwrite=overwrite) as target:
        scratch = target / "scratch"
        scratch.mkdir()
        started = time.perf_counter()
        corpus = Corpus(cache, scratch / "corpus", n_rows)
        postings, encode_seconds = encode_corpus(sae, cache, corpus, scratch / "codes", config, report)
        vocabulary = corpus_vocabulary(corpus, cache, token_strings, 0 if lens is None else lens.unembed.shape[1])
        describer = Describer(sae, cache, corpus, postings, config, lens, vocabulary)
        meta = _meta(sae, cache, config, describer, n_rows)
        meta["encode_seconds"] = encode_seconds
        _write(target, describer, postings, config, meta, report, started)
        del corpus, postings, describer
        shutil.rmtree(scratch)
    return FeatureIndex(folder)


def batch_rows(sae: SAE, config: IndexConfig) -> int:
    """How many tokens are encoded at once."""
    return min(config.batch_size, max(PRE_ACTS // sae.d_sae, 256))


@torch.no_grad()
def encode_corpus(
    sae: SAE, cache: ActivationCache, corpus: Corpus, folder: Path, config: IndexConfig, report: Progress
) -> tuple[Postings, float]:
    """The pass over the cache; returns the codes and the seconds spent in ``sae.encode``."""
    writer, done, seconds = PostingsWriter(folder, sae.n_features, config.run_entries), 0, 0.0
    size = batch_rows(sae, config)
    with sae.evaluating(), default_precision("auto"), closing(Background()) as background, ExitStack() as stack:
        stack.callback(cache.release)

        def keep(code: SparseCode, acts: Tensor, at: int) -> None:
            writer.add(sae.features(code))
            # In units in which squares neither overflow nor vanish; a power of two changes no bit, and no correlation.
            corpus.norms[at : at + len(acts)] = (acts * cache.manifest.scale).norm(dim=1).cpu().numpy()

        for number, batch in enumerate(cache.head(corpus.n_rows, size)):
            if number % RELEASE_EVERY == 0:
                cache.release()
            acts = batch.acts.to(sae.device)
            tick = time.perf_counter()
            code = sae.encode(acts)
            seconds += time.perf_counter() - tick
            # A thread takes codes apart and writes them while the next batch is read and encoded.
            background.submit(partial(keep, code, acts, done))
            done += len(acts)
            report("encode", done, corpus.n_rows)
        background.drain()
    return writer.finish(), seconds


def _write(
    target: Path,
    describer: Describer,
    postings: Postings,
    config: IndexConfig,
    meta: dict[str, Any],
    report: Progress,
    started: float,
) -> None:
    features, examples = schema.arrow_schema(schema.FEATURE_COLUMNS), schema.arrow_schema(schema.EXAMPLE_COLUMNS)
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1}
    total = postings.n_slots // 2
    with (
        pq.ParquetWriter(target / FEATURES, features, **options) as feature_file,
        pq.ParquetWriter(target / EXAMPLES, examples, **options) as example_file,
    ):
        ranges = postings.slot_ranges(config.chunk_entries, 2 * config.chunk_latents)
        for stop, (columns, windows) in _described(describer, list(ranges)):
            feature_file.write_table(columns)
            # Small row groups: a latent's page reads one of them.
            example_file.write_table(windows, row_group_size=4096)
            report("describe", stop // 2, total)
        meta["seconds"] = time.perf_counter() - started
        meta["tokens_per_second"] = meta["tokens"] / meta["seconds"]
        for file in (feature_file, example_file):
            file.add_key_value_metadata({schema.META_KEY: json.dumps(meta)})


def _described(
    describer: Describer, ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, tuple[pa.Table, pa.Table]]]:
    """The end of each range of slots, and its tables, in order; several ranges are described at a time.

    Sorting, searching and counting leave Python's lock alone, and a range depends on no other.
    """
    workers = max(1, min(torch.get_num_threads(), WORKERS, len(ranges)))
    with ThreadPoolExecutor(workers, thread_name_prefix="saelab-index") as pool:
        pending: deque[tuple[int, Future[tuple[pa.Table, pa.Table]]]] = deque()
        try:
            for start, stop in ranges:
                pending.append((stop, pool.submit(describer.tables, start, stop)))
                if len(pending) > workers:
                    end, future = pending.popleft()
                    yield end, future.result()
            while pending:
                end, future = pending.popleft()
                yield end, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _meta(sae: SAE, cache: ActivationCache, config: IndexConfig, describer: Describer, n_rows: int) -> dict[str, Any]:
    manifest = cache.manifest
    return {
        "version": schema.VERSION,
        "variant": sae.variant,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "poles": list(describer.poles),
        "tokens": n_rows,
        "cache": str(cache.path),
        "cache_fingerprint": cache.fingerprint,
        "model": manifest.model,
        "language_model": ModelRecord.from_manifest(manifest).to_json(),
        "hook_name": manifest.hook_name,
        **({} if cache.target is None else {"hook_name_out": cache.target.hook_name}),
        "context_length": manifest.context_length,
        "skip_first": manifest.skip_first,
        "histogram_edges": describer.edges.tolist(),
        "logit_lens": describer.lens is not None,
        "config": asdict(config),
        "columns": {name: text for name, (_, text) in schema.FEATURE_COLUMNS.items()},
        "example_columns": {name: text for name, (_, text) in schema.EXAMPLE_COLUMNS.items()},
    }


def corpus_vocabulary(corpus: Corpus, cache: ActivationCache, strings: Sequence[str] | None, size: int) -> pa.Array:
    """Text of every token id, at least ``size``, then the characters of which tokens of the corpus are parts."""
    largest = int(corpus.text.max())
    known = cache.vocabulary if strings is None else strings
    known = known if isinstance(known, Vocabulary) else Vocabulary(known)
    if strings is not None and len(known) <= largest:
        raise UserError(
            f"token id {largest} of the cache has no text: the vocabulary has {len(known)} entries; "
            "give token_strings for all"
        )
    # An unembedding may have more rows than the tokenizer has tokens.
    names = [known.alone(number) for number in range(max(len(known), largest + 1, size))]
    return pa.array(corpus.name_parts(known, names), pa.string())

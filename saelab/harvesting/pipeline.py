"""``harvest`` and ``harvest_many``: run text through a model and write one activation cache per hook point."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.data.cache import ActivationCache, CacheWriter, Manifest
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import prepare
from saelab.data.packing import Contexts, pack, resolve_bos, resolve_separator
from saelab.data.text import TextSource, open_text
from saelab.data.text.source import listed
from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.harvesting.config import HarvestConfig
from saelab.harvesting.shards import ALONE, Progress, Share, fill, finish_caches, first_alone, open_writers
from saelab.lm.fingerprint import tokenizer_hash
from saelab.lm.hook_patterns import expand, is_pattern
from saelab.lm.loading import load_model, model_name
from saelab.lm.randomised import RANDOM
from saelab.lm.record import ModelRecord
from saelab.lm.sites import locate
from saelab.lm.structure import underlying
from saelab.lm.tokens import vocabulary

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def harvest(
    model: TransformerBridge | str,
    hook: str,
    text: str | Path | TextSource,
    out: str | Path,
    config: HarvestConfig | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> ActivationCache:
    """Run text through a model, no further than one hook point, and keep the activations there in a cache at ``out``.

    ``model`` is a loaded bridge or a name for :func:`load_model`, ``text`` a source or a name for :func:`open_text`.
    ``progress`` is called with (tokens done, tokens asked for). With ``resume`` an interrupted harvest with the same
    settings continues with the missing shards, and the result is bit for bit that of an uninterrupted one. With
    ``share`` several processes call this; they may resume a harvest that another number of processes began. Raises
    UserError, before anything is written, for every invalid input.
    """
    if not isinstance(hook, str):
        raise UserError(f"hook={hook!r} is not the name of one hook point; call harvest_many for several")
    if is_pattern(hook):
        raise UserError(f"hook={hook!r} may stand for several hook points; call harvest_many for them")
    folder = Folder(out)
    harvest_into(model, {hook: folder}, text, config, overwrite, resume, progress, share)
    return ActivationCache(folder.url)


def harvest_many(
    model: TransformerBridge | str,
    hooks: Sequence[str],
    text: str | Path | TextSource,
    out: str | Path,
    config: HarvestConfig | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> dict[str, ActivationCache]:
    """:func:`harvest` at several hook points in one pass: a cache each, in the sub-folder of ``out`` of its name.

    ``hooks`` may be patterns, ``blocks.*.hook_resid_post`` for example (see :mod:`saelab.lm.hook_patterns`).
    """
    if isinstance(hooks, str) or not hooks:
        raise UserError(f"hooks={hooks!r} is not a list of hook points; call harvest for one")
    model = load_model(model) if isinstance(model, str) else model
    hooks = expand(model, hooks)
    folders = {name: Folder(out).sub(name) for name in hooks}
    harvest_into(model, folders, text, config, overwrite, resume, progress, share)
    return {name: ActivationCache(folder.url) for name, folder in folders.items()}


def harvest_into(
    model: TransformerBridge | str,
    folders: Mapping[str, Folder],
    text: str | Path | TextSource,
    config: HarvestConfig | None,
    overwrite: bool,
    resume: bool,
    progress: Progress | None,
    share: Share = ALONE,
    reader: Reader | None = None,
) -> None:
    """Write the cache of each hook point into its folder; see :func:`harvest`.

    ``reader`` is one of the model at these hook points that has been compared on this text.
    """
    config = config or HarvestConfig()
    first_alone(share, lambda: [prepare(f, overwrite=overwrite, resume=resume, dry=True) for f in folders.values()])
    bridge = load_model(model) if isinstance(model, str) else model
    config = config.sized(underlying(bridge))
    sites = [locate(bridge, name) for name in folders]
    source = text if isinstance(text, TextSource) else open_text(text)
    bos = resolve_bos(config.bos, bridge.tokenizer)
    separator = resolve_separator(config.separator, bridge.tokenizer, bos)
    left_out: Counter[str] = Counter()  # of the text that was used, whatever has been read ahead
    shape = config.context_length, bos, config.pass_contexts, separator, config.document_tokens
    batches = _limited(pack(source, bridge.tokenizer, *shape, share.division, left_out), config.contexts)
    first = next(batches, None)
    if first is None:
        without = f" (left out: {listed(left_out)})" if left_out else ""
        raise UserError(f"{source.name}{without} is shorter than one context of {shape[0]} tokens; lower it")
    if reader is None:
        reader = Reader(bridge, sites)
        reader.use_plain_model(first.tokens[:1], config.skip_first)
    widths = reader.widths(first.tokens[:1])
    shared: dict[str, Any] = _provenance(bridge, source, config) | {"bos": bos, "separator": separator}
    if bos == "document":
        shared["settings"]["bos_rows"] = False  # unlike 0.1.0, whose unfinished harvests cannot be continued
    shared["settings"]["shard_passes"] = config.shard_passes(max(widths), len(widths))
    manifests = [
        Manifest(d_in=d_in, hook_name=site.hook_name, hf_hook_name=site.path, side=site.side, **shared)
        for site, d_in in zip(sites, widths)
    ]

    made: list[CacheWriter] = []

    def writers() -> list[CacheWriter]:
        for folder, manifest in zip(folders.values(), manifests):
            made.append(CacheWriter(folder, manifest, overwrite=overwrite, resume=resume, rank=share.rank))
        return made

    total = config.contexts * config.context_length
    try:
        opened = open_writers(writers, reader, first, share, config.gradients)
        fill(reader, opened, itertools.chain([first], batches), total, progress, share)
        share.wait()
        if share.rank == 0:
            finish_caches(opened, vocabulary(bridge.tokenizer), dict(left_out))
        share.wait()
    finally:  # any process may resume a harvest that failed
        for writer in made:
            writer.close()


def _provenance(model: TransformerBridge, source: TextSource, config: HarvestConfig) -> dict[str, Any]:
    name, revision = model_name(model)
    record = ModelRecord.of(model)
    settings = {"tokens": config.tokens, "pass_contexts": config.pass_contexts, "gradients": config.gradients}
    if config.document_tokens is not None:
        settings["document_tokens"] = config.document_tokens
    if (random := getattr(underlying(model), RANDOM, None)) is not None:
        settings["random_weights"] = random.record()
    return {
        "model": name,
        "revision": revision,
        "model_dtype": record.dtype,
        "weights_fingerprint": record.fingerprint,
        "weights_rounded": record.rounded,
        "tokenizer": str(model.tokenizer.name_or_path) if name != "smollm2" else name,
        "tokenizer_hash": tokenizer_hash(model.tokenizer),
        "text": source.name,
        "text_fingerprint": source.fingerprint,
        "context_length": config.context_length,
        "kept_roles": list(config.roles),
        "skip_first": config.skip_first,
        "max_norm": config.max_norm,
        "dtype": config.dtype,
        "held_out_fraction": config.held_out,
        "settings": settings,
    }


def _limited(batches: Iterator[Contexts], wanted: int) -> Iterator[Contexts]:
    """The first ``wanted`` contexts."""
    while wanted > 0 and (batch := next(batches, None)) is not None:
        yield Contexts(*(column[:wanted] for column in batch))
        wanted -= len(batch.tokens)

"""``harvest``: run text through a model and write one activation cache per hook point."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from saelab.data.cache import ActivationCache, CacheWriter, Manifest
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import prepare
from saelab.data.packing import Contexts, pack, resolve_bos
from saelab.data.text import TextSource, open_text
from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.harvesting.config import HarvestConfig
from saelab.harvesting.shards import ALONE, Progress, Share, fill, finish, open_writers
from saelab.lm.fingerprint import tokenizer_hash, weights_fingerprint
from saelab.lm.loading import load_model, model_name
from saelab.lm.sites import locate
from saelab.lm.tokens import token_strings

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@overload
def harvest(
    model: TransformerBridge | str,
    hooks: str,
    text: str | Path | TextSource,
    out: str | Path,
    config: HarvestConfig = ...,
    *,
    overwrite: bool = ...,
    resume: bool = ...,
    progress: Progress | None = ...,
    share: Share = ...,
) -> ActivationCache: ...


@overload
def harvest(
    model: TransformerBridge | str,
    hooks: list[str] | tuple[str, ...],
    text: str | Path | TextSource,
    out: str | Path,
    config: HarvestConfig = ...,
    *,
    overwrite: bool = ...,
    resume: bool = ...,
    progress: Progress | None = ...,
    share: Share = ...,
) -> dict[str, ActivationCache]: ...


def harvest(
    model: TransformerBridge | str,
    hooks: str | list[str] | tuple[str, ...],
    text: str | Path | TextSource,
    out: str | Path,
    config: HarvestConfig | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> ActivationCache | dict[str, ActivationCache]:
    """Run text through a model, no further than needed, and keep the activations at some hook points.

    One hook name gives one cache at ``out``; a list gives a sub-folder of ``out`` per hook, all from the same pass.
    ``model`` is a loaded bridge or a name for :func:`load_model`, ``text`` a source or a name for :func:`open_text`.
    ``progress`` is called with (tokens done, tokens asked for). With ``resume`` an interrupted harvest with the same
    settings continues with the missing shards, and the result is bit for bit that of an uninterrupted one. With
    ``share`` several processes call this; they may resume a harvest that another number of processes began. Raises
    UserError, before anything is written, for every invalid input.
    """
    config = config or HarvestConfig()
    folders = [Folder(out)] if isinstance(hooks, str) else [Folder(out).sub(name) for name in hooks]
    for folder in folders if share.rank == 0 else []:
        prepare(folder, overwrite=overwrite, resume=resume, dry=True)
    bridge = load_model(model) if isinstance(model, str) else model
    names = [hooks] if isinstance(hooks, str) else list(hooks)
    sites = [locate(bridge, name) for name in names]
    source = text if isinstance(text, TextSource) else open_text(text)
    bos = resolve_bos(config.bos, bridge.tokenizer)
    packed = pack(source, bridge.tokenizer, config.context_length, bos, config.pass_contexts)
    batches = _limited(packed, config.contexts)
    first = next(batches, None)
    if first is None:
        raise UserError(f"{source.name} is shorter than one context of {config.context_length} tokens; lower it")
    reader = Reader(bridge, sites)
    reader.use_plain_model(first.tokens[:1])
    widths = reader.widths(first.tokens[:1])
    shared: dict[str, Any] = _provenance(bridge, source, config) | {"bos": bos}
    shared["settings"]["shard_passes"] = config.shard_passes(max(widths))
    manifests = [
        Manifest(d_in=d_in, hook_name=site.hook_name, hf_hook_name=site.path, side=site.side, **shared)
        for site, d_in in zip(sites, widths)
    ]

    made: list[CacheWriter] = []

    def writers() -> list[CacheWriter]:
        for folder, manifest in zip(folders, manifests):
            made.append(CacheWriter(folder, manifest, overwrite=overwrite, resume=resume, rank=share.rank))
        return made

    total = config.contexts * config.context_length
    try:
        opened = open_writers(writers, reader, first, share)
        fill(reader, opened, itertools.chain([first], batches), total, progress, share)
        share.wait()
        if share.rank == 0:
            finish(opened, token_strings(bridge.tokenizer))
        share.wait()
    finally:  # any process may resume a harvest that failed
        for writer in made:
            writer.close()
    caches = [ActivationCache(folder.url) for folder in folders]
    return caches[0] if isinstance(hooks, str) else dict(zip(names, caches))


def _provenance(model: TransformerBridge, source: TextSource, config: HarvestConfig) -> dict[str, Any]:
    name, revision = model_name(model)
    settings = {"tokens": config.tokens, "pass_contexts": config.pass_contexts, "gradients": config.gradients}
    return {
        "model": name,
        "revision": revision,
        "weights_fingerprint": weights_fingerprint(model),
        "tokenizer": str(model.tokenizer.name_or_path) if name != "smollm2" else name,
        "tokenizer_hash": tokenizer_hash(model.tokenizer),
        "text": source.name,
        "text_fingerprint": source.fingerprint,
        "context_length": config.context_length,
        "skip_first": config.skip_first,
        "max_norm": config.max_norm,
        "dtype": config.dtype,
        "held_out_fraction": config.held_out,
        "settings": settings,
    }


def _limited(batches: Iterator[Contexts], wanted: int) -> Iterator[Contexts]:
    """The first ``wanted`` contexts."""
    while wanted > 0 and (batch := next(batches, None)) is not None:
        yield Contexts(batch.tokens[:wanted], batch.documents[:wanted])
        wanted -= len(batch.tokens)

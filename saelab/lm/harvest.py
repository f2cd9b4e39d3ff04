"""``harvest``: text through a model into activation caches, one per hook point."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache import ActivationCache, CacheWriter, Manifest
from saelab.data.cache.manifest import power_of_two
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import prepare
from saelab.data.packing import Contexts, pack, resolve_bos
from saelab.data.text import TextSource, open_text
from saelab.errors import UserError
from saelab.lm.capture import Reader
from saelab.lm.config import HarvestConfig
from saelab.lm.fingerprint import token_strings, tokenizer_hash, weights_fingerprint
from saelab.lm.hooks import find_hook
from saelab.lm.loading import load_model, model_name

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Progress = Callable[[int, int], None]


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
) -> ActivationCache | dict[str, ActivationCache]:
    """Run text through a model, no further than needed, and keep the activations at some hook points.

    One hook name gives one cache at ``out``; a list gives a sub-folder of ``out`` per hook, all from the same pass.
    ``model`` is a loaded bridge or a name for :func:`load_model`, ``text`` a source or a name for :func:`open_text`.
    ``progress`` is called with (tokens done, tokens asked for). With ``resume`` an interrupted harvest of the same
    settings goes on after its last complete shard, and the result is bit for bit the uninterrupted one. Raises
    UserError, before anything is written, for whatever a user can mend.
    """
    config = config or HarvestConfig()
    folders = [Folder(out)] if isinstance(hooks, str) else [Folder(out).sub(name) for name in hooks]
    for folder in folders:
        prepare(folder, overwrite=overwrite, resume=resume, dry=True)
    bridge = load_model(model) if isinstance(model, str) else model
    names = [hooks] if isinstance(hooks, str) else list(hooks)
    sites = [find_hook(bridge, name) for name in names]
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
    writers = []
    for folder, site, d_in in zip(folders, sites, widths):
        manifest = Manifest(d_in=d_in, hook_name=site.hook_name, hf_hook_name=site.module, **shared)
        writers.append(CacheWriter(folder, manifest, overwrite=overwrite, resume=resume))
    total = config.contexts * config.context_length
    _fill(reader, writers, itertools.chain([first], batches), total, progress)
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


def _fill(
    reader: Reader, writers: list[CacheWriter], batches: Iterator[Contexts], total: int, progress: Progress | None
) -> None:
    """Write the shards that are missing, then the statistics."""
    if all(writer.complete for writer in writers):
        return
    settings = writers[0].manifest.settings
    # A kill between two hooks' shards leaves one more of the first: all go on from the shard they have in common.
    shards = min(len(writer.manifest.shards) for writer in writers)
    for writer in writers:
        writer.truncate(shards)
    done = writers[0].manifest.n_tokens
    batches = itertools.islice(batches, shards * settings["shard_passes"], None)
    vocabulary = token_strings(reader.model.tokenizer)
    while group := list(itertools.islice(batches, settings["shard_passes"])):
        parts: list[list[Rows]] = [[] for _ in writers]
        for batch in group:
            acts, grads = reader.both(batch.tokens, settings["gradients"])
            for index, writer in enumerate(writers):
                first = sum(len(part.acts) for part in parts[index])
                parts[index].append(_rows(writer, acts[index], grads[index], first))
            done += batch.tokens.numel()
            if progress is not None:
                progress(done, total)
        text, documents = (torch.cat([getattr(b, name).flatten() for b in group]) for name in ("tokens", "documents"))
        for writer, rows in zip(writers, parts):
            _write(writer, rows, text, documents)
    for writer in writers:
        if not writer.complete:
            writer.write_vocabulary(vocabulary)
            writer.finish()


class Rows(NamedTuple):
    """What one pass adds to a shard."""

    acts: Float[Tensor, "rows d_in"]
    grads: Float[Tensor, "rows d_in"] | None
    slots: Int[Tensor, " rows"]  # positions in the pass's text
    tokens: int  # of text in the pass


def _rows(writer: CacheWriter, acts: Tensor, grads: Tensor | None, first: int) -> Rows:
    """The positions that get a row, in the cache's dtype; gradients scaled."""
    manifest = writer.manifest
    keep = torch.zeros(acts.shape[:2], dtype=torch.bool, device=acts.device)
    keep[:, manifest.skip_first :] = True
    if manifest.max_norm is not None:
        keep &= acts.float().norm(dim=-1) <= manifest.max_norm
    slots = keep.flatten().nonzero().flatten()
    scaled = None
    if grads is not None:
        if manifest.grad_scale is None:
            # The largest entry becomes about 16: a factor 4000 below the end of float16, and what is 2^-18 of it
            # (below float16's normal numbers without scaling) still has full precision.
            largest = float(grads.abs().max())
            manifest.grad_scale = power_of_two(16 / largest) if largest > 0 else 1.0
        scaled = writer.storable(grads.flatten(0, 1)[slots].float() * manifest.grad_scale, "gradients", first)
    stored = writer.storable(acts.flatten(0, 1)[slots], "activations", first)
    return Rows(stored, scaled, slots.cpu(), keep.numel())


def _write(writer: CacheWriter, rows: list[Rows], text: Tensor, documents: Tensor) -> None:
    offsets = itertools.accumulate((part.tokens for part in rows), initial=0)
    slots = torch.cat([part.slots + offset for part, offset in zip(rows, offsets)])
    grads = [part.grads for part in rows if part.grads is not None]
    acts = torch.cat([part.acts for part in rows])
    writer.write_shard(acts, text, slots, documents, torch.cat(grads) if grads else None)

"""Describe activation caches, and merge several into one."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from saelab.data.cache.manifest import PARTIAL, Manifest, ShardInfo
from saelab.data.cache.reader import ActivationCache
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import complete_manifest, discard, prepare, publish
from saelab.errors import UserError
from saelab.layout import MANIFEST, TOKENS

_log = logging.getLogger(__name__)

# Caches that differ in one of these fields cannot be merged.
_ALIKE = (
    *("d_in", "dtype", "hook_name", "hf_hook_name", "weights_fingerprint", "tokenizer_hash", "context_length"),
    *("bos", "separator", "kept_roles", "skip_first", "max_norm", "has_grads"),
)


def caches_in(path: str | os.PathLike[str]) -> list[ActivationCache]:
    """The cache at ``path``, or the caches in its sub-folders, as a harvest of several hooks writes them."""
    folder = Folder(path)
    if folder.exists(MANIFEST):
        return [ActivationCache(path)]
    found = [folder.sub(name) for name in folder.names() if folder.sub(name).exists(MANIFEST)]
    return [ActivationCache(sub.url) for sub in found] or [ActivationCache(path)]


def cache_summary(cache: ActivationCache) -> dict[str, Any]:
    """The facts that ``saelab cache info`` prints; sizes in bytes, norms in raw units."""
    m = cache.manifest
    return {
        "path": cache.path,
        "hook_name": m.hook_name,
        "hf_hook_name": m.hf_hook_name,
        "model": m.model,
        "revision": m.revision,
        "text": m.text,
        "rows": cache.n_rows,
        "train_rows": cache.n_split("train"),
        "held_out_rows": cache.n_split("held_out"),
        "rows_in_neither": m.held_out_from - m.train_rows,
        "tokens": m.n_tokens,
        "contexts": m.n_contexts,
        "documents": m.n_documents,
        "context_length": m.context_length,
        "bos": m.bos,
        "separator": m.separator,
        "roles": ", ".join(m.kept_roles) or ("all" if m.roles else "no chats"),
        "skip_first": m.skip_first,
        "max_norm": m.max_norm,
        "dropped_rows": m.dropped_rows,
        "left_out": m.left_out,
        "d_in": m.d_in,
        "dtype": m.dtype,
        "gradients": m.has_grads,
        "shards": len(m.shards),
        "bytes": sum(shard.bytes for shard in m.shards),
        "rms_norm": m.rms_norm,
        "mean_norm": m.mean_norm,
        "variance": m.variance,
        "scale": m.scale,
        "fingerprint": cache.fingerprint,
    }


def merge(
    caches: Sequence[ActivationCache], out: str | os.PathLike[str], *, overwrite: bool = False
) -> ActivationCache:
    """Join caches of the same hook of the same model, in the given order, into a new one.

    Shards are copied; the held-out split (the last contexts of the whole) and the statistics are computed again.
    Gradients stored with different scales get the smallest of them, which costs nothing but the last bits of entries
    that were already close to zero.
    """
    if not caches:
        raise UserError("nothing to merge; name at least one cache")
    first = caches[0].manifest
    _check_alike(caches)
    folder = Folder(out)
    for cache in caches:
        if cache.path == folder.url or (
            folder.local and cache.folder.local and _same(folder.local, cache.folder.local)
        ):
            raise UserError(f"{folder.url} is one of the caches to merge; write to another folder")
    texts = list(dict.fromkeys(cache.manifest.text for cache in caches))
    joined = "".join(cache.manifest.text_fingerprint for cache in caches)
    scales = [cache.manifest.grad_scale for cache in caches if cache.manifest.grad_scale is not None]
    manifest = replace(
        first,
        text=" + ".join(texts),
        text_fingerprint=hashlib.sha256(joined.encode()).hexdigest()[:16],
        grad_scale=min(scales, default=None),
        settings={},
        shards=[],
        n_documents=0,
        roles=max((cache.manifest.roles for cache in caches), key=len),
        left_out=dict(sum((Counter(cache.manifest.left_out) for cache in caches), Counter())),
    )
    with folder.lock():
        prepare(folder, overwrite=overwrite, resume=False)
        try:
            folder.write(PARTIAL, manifest.to_json().encode())  # marks it as a cache, to be overwritten after a kill
            for cache in caches:
                _append(folder, manifest, cache)
            complete_manifest(folder, manifest)
            if caches[0].folder.exists(TOKENS):
                folder.write(TOKENS, caches[0].folder.read(TOKENS))
            publish(folder, manifest)
        except BaseException:
            discard(folder)
            raise
    return ActivationCache(out)


def _check_alike(caches: Sequence[ActivationCache]) -> None:
    first = caches[0].manifest
    # Without a fingerprint, as after an import, the name is all that tells one model from another.
    alike = _ALIKE if first.weights_fingerprint else (*_ALIKE, "model", "revision")
    for cache in caches[1:]:
        for name in alike:
            a, b = getattr(first, name), getattr(cache.manifest, name)
            if a != b:
                raise UserError(f"cannot merge {cache.path}: its {name} is {b!r}, that of {caches[0].path} is {a!r}")
        # Equal hashes are equal vocabularies, which 0.1.0 wrote in another form.
        if not first.tokenizer_hash and _words(cache) != _words(caches[0]):
            raise UserError(
                f"cannot merge {cache.path}: its vocabulary is not that of {caches[0].path}, so that its token "
                f"ids would be shown as other words; give both the same {TOKENS}"
            )
    if len(caches) > 1 and not first.weights_fingerprint and not first.model:
        _log.warning("the caches do not say of which model they are, and are taken for activations of one")


def _words(cache: ActivationCache) -> tuple[list[str], dict[int, bytes]]:
    return cache.vocabulary.texts, cache.vocabulary.parts


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _append(folder: Folder, manifest: Manifest, cache: ActivationCache) -> None:
    for shard in cache.manifest.shards:
        data = cache.folder.read(shard.file)
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise UserError(f"{cache.path}/{shard.file} is corrupted (checksum differs); harvest the cache again")
        if cache.manifest.grad_scale != manifest.grad_scale:
            tensors = safetensors.torch.load(data)
            factor = (manifest.grad_scale or 1.0) / (cache.manifest.grad_scale or 1.0)
            tensors["grads"] = tensors["grads"] * factor
            data = safetensors.torch.save(tensors)
        name = f"shard_{len(manifest.shards):05d}.safetensors"
        folder.write(name, data)
        offset = shard.document_offset + manifest.n_documents
        digest = hashlib.sha256(data).hexdigest()
        manifest.shards.append(ShardInfo(name, shard.rows, shard.tokens, shard.contexts, digest, len(data), offset))
    manifest.n_documents += cache.manifest.n_documents

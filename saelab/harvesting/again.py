"""The text of an existing cache through another model: the same tokens, rows and splits, other activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache import ActivationCache, CacheWriter
from saelab.data.cache.storage import Folder
from saelab.harvesting.activations import Reader
from saelab.harvesting.config import PASS
from saelab.lm.loading import model_name
from saelab.lm.randomised import RANDOM
from saelab.lm.record import ModelRecord
from saelab.lm.sites import locate
from saelab.lm.structure import underlying


def harvest_again(
    model: Any,
    cache: ActivationCache,
    out: Path | str,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ActivationCache:
    """Run the token ids of ``cache`` through ``model`` to the same hook point, into a new cache at ``out``.

    Row i of both caches is the same token in the same context and the same split. ``model`` must read the same token
    ids, as one of the same kind with other weights does. Gradients are not taken. ``progress`` is called with (tokens
    done, tokens in all).
    """
    manifest, (name, revision), record = cache.manifest, model_name(model), ModelRecord.of(model)
    site = locate(model, manifest.hook_name or manifest.hf_hook_name)
    random = getattr(underlying(model), RANDOM, None)
    settings = {**manifest.settings, "tokens_of": cache.fingerprint}
    new = replace(
        manifest, shards=[], settings=settings | ({} if random is None else {"random_weights": random.record()}),
        model=name, revision=revision, model_dtype=record.dtype, weights_fingerprint=record.fingerprint,
        weights_rounded=record.rounded, grad_scale=None, max_norm=None,
    )  # fmt: skip
    reader, done = Reader(model, [site]), 0
    writer = CacheWriter(Folder(out), new, overwrite=overwrite)
    try:
        for (text, documents, slots), roles in zip(cache.shard_texts(), cache.shard_roles()):
            acts = _activations(reader, text.long(), manifest.context_length)[slots.long()]
            writer.write_shard(acts, text, slots, documents, roles=roles)
            done += len(text)
            if progress is not None:
                progress(done, manifest.n_tokens)
        if cache.n_vocabulary:
            writer.write_vocabulary(cache.vocabulary)
        writer.finish()
    finally:
        writer.close()
    return ActivationCache(out)


@torch.no_grad()
def _activations(reader: Reader, text: Int[Tensor, " tokens"], context: int) -> Float[Tensor, "tokens d_in"]:
    """Activations under every token of a shard, whose last context may be shorter than the others."""
    whole = len(text) // context * context
    contexts = list(text[:whole].view(-1, context).split(max(PASS // context, 1)))
    contexts += [text[None, whole:]] if whole < len(text) else []
    if contexts:
        reader.use_plain_model(contexts[0][:1])
    return torch.cat([reader.activations(part)[0].flatten(0, 1).float().cpu() for part in contexts])

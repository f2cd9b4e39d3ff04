"""Whether two caches hold the same tokens, row by row: then one of them can be the target of an SAE on the other."""

from __future__ import annotations

import torch

from saelab.data.cache.shards import Shards
from saelab.errors import UserError

MODEL = ("model", "revision", "weights_fingerprint", "model_dtype")
TEXT = ("tokenizer_hash", "text_fingerprint", "bos", "skip_first", "context_length")
ROWS = ("max_norm", "held_out_from", "train_until", "n_rows")


def check_same_rows(cache: Shards, target: Shards) -> None:
    """Raise UserError, naming the first difference, unless every row of both caches is of the same token.

    The manifests must agree on model, text and rows; then the tokens, their places in the text and their documents are
    compared, all of them.
    """
    if cache.folder.url == target.folder.url:
        raise UserError(
            f"{cache.folder.url} is both the input and the target; leave the target out, or name another cache"
        )
    for name in (*MODEL, *TEXT, *ROWS):
        ours, theirs = getattr(cache.manifest, name), getattr(target.manifest, name)
        if ours != theirs:
            raise _refusal(cache, target, f"{name} is {ours!r} of one and {theirs!r} of the other")
    parts = [[(s.rows, s.tokens, s.document_offset) for s in c.manifest.shards] for c in (cache, target)]
    if parts[0] != parts[1]:
        raise _refusal(cache, target, "their shards are divided differently")
    for index in range(len(parts[0])):
        ours, theirs = cache.columns(index), target.columns(index)
        for name in ("text", "slots", "documents"):
            if not torch.equal(ours[name].all().long(), theirs[name].all().long()):
                raise _refusal(cache, target, f"{name} of {cache.manifest.shards[index].file} differ")


def _refusal(cache: Shards, target: Shards, why: str) -> UserError:
    return UserError(
        f"{cache.folder.url} and {target.folder.url} are not of one harvest: {why}; harvest both places in one pass, "
        "`saelab harvest --hook INPUT TARGET`"
    )

"""Pack documents into contexts of equal length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.data.text import TextSource
from saelab.errors import UserError

Bos = Literal["context", "document", "none"]
_BATCH = 1 << 20  # characters handed to the tokenizer at a time: it works on them in parallel


class Contexts(NamedTuple):
    """Equally long token sequences, and the number of the document that each token comes from."""

    tokens: Int[Tensor, "n_ctx ctx"]
    documents: Int[Tensor, "n_ctx ctx"]


def resolve_bos(bos: Bos | Literal["auto"], tokenizer: Any) -> Bos:
    """``auto`` is one BOS per context where the tokenizer has a BOS token, else none."""
    if bos == "auto":
        return "context" if tokenizer.bos_token_id is not None else "none"
    if bos not in get_args(Bos):
        raise UserError(f"bos={bos!r} is not one of {', '.join(get_args(Bos))}, auto")
    if bos != "none" and tokenizer.bos_token_id is None:
        raise UserError(f"the tokenizer has no BOS token, so bos={bos!r} is impossible; use bos='none'")
    return bos


def pack(source: TextSource, tokenizer: Any, length: int, bos: Bos, batch: int) -> Iterator[Contexts]:
    """Concatenate documents and cut them into contexts of ``length`` tokens, ``batch`` contexts at a time.

    ``bos="context"`` puts the BOS token at the start of every context, ``"document"`` at the start of every
    document, ``"none"`` nowhere. Tokens that do not fill a last context are dropped; the last batch may be short.
    """
    prefix = 1 if bos == "context" else 0
    body = length - prefix
    if body < 1:
        raise UserError(f"context length {length} leaves no room for text; raise it")
    held: list[np.ndarray] = []
    count, wanted = 0, batch * body
    for part in _tokens(source, tokenizer, tokenizer.bos_token_id if bos == "document" else None):
        held.append(part)
        count += part.shape[1]
        while count >= wanted:
            flat = np.concatenate(held, axis=1)
            yield _contexts(flat[:, :wanted], body, tokenizer.bos_token_id if prefix else None)
            held = [flat[:, wanted:]]
            count -= wanted
    if count >= body:
        flat = np.concatenate(held, axis=1)
        yield _contexts(flat[:, : count // body * body], body, tokenizer.bos_token_id if prefix else None)


def _tokens(source: TextSource, tokenizer: Any, bos_id: int | None) -> Iterator[np.ndarray]:
    """``[2, m]``: token ids and document numbers of a few documents at a time."""
    document = -1
    for group in _grouped(source):
        ids = tokenizer([text for _, text in group], add_special_tokens=False, verbose=False)["input_ids"]
        rows, owners = [], []
        for (starts, _), row in zip(group, ids):
            document += starts
            if starts and bos_id is not None:
                row = [bos_id, *row]
            rows.append(np.asarray(row, dtype=np.int64))
            owners.append(np.full(len(row), document))
        yield np.stack([np.concatenate(rows), np.concatenate(owners)])


def _grouped(source: TextSource) -> Iterator[list[tuple[bool, str]]]:
    group: list[tuple[bool, str]] = []
    size = 0
    for piece in source.pieces():
        group.append(piece)
        size += len(piece[1])
        if size >= _BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group


def _contexts(flat: np.ndarray, body: int, bos_id: int | None) -> Contexts:
    tokens, documents = torch.from_numpy(flat.reshape(2, -1, body).copy())
    if bos_id is not None:
        tokens = torch.cat([torch.full((len(tokens), 1), bos_id), tokens], dim=1)
        documents = torch.cat([documents[:, :1], documents], dim=1)
    return Contexts(tokens, documents)

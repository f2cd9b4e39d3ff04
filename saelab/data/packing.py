"""Pack documents into contexts of equal length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from saelab.data.chat import SEPARATOR, TEXT
from saelab.data.text.source import TextSource
from saelab.data.tokenized import UNDIVIDED, Division, Group, tokenized
from saelab.errors import UserError
from saelab.vocabulary import bos_token_id, encoded

Bos = Literal["context", "document", "none"]
NOTHING = "none"
# Between documents many chat models have not seen their EOS token, which ends a turn, but one of these.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


class Contexts(NamedTuple):
    """Equally long token sequences, with the number of the document and of the role (in ``ROLES``) of each token.

    A separator belongs to the document that it ends.
    """

    tokens: Int[Tensor, "n_ctx ctx"]
    documents: Int[Tensor, "n_ctx ctx"]
    roles: Int[Tensor, "n_ctx ctx"]


def resolve_bos(bos: Bos | Literal["auto"], tokenizer: Any) -> Bos:
    """``auto`` is one BOS per context where the tokenizer has a BOS token, else none."""
    if bos == "auto":
        return "context" if bos_token_id(tokenizer) is not None else "none"
    if bos not in get_args(Bos):
        raise UserError(f"bos={bos!r} is not one of {', '.join(get_args(Bos))}, auto")
    if bos != "none" and bos_token_id(tokenizer) is None:
        raise UserError(f"the tokenizer has no BOS token, so bos={bos!r} is impossible; use bos='none'")
    return bos


def resolve_separator(separator: str, tokenizer: Any, bos: Bos) -> str:
    """What stands between two documents: the text of a token or a line end, or ``none`` for nothing.

    ``auto`` is nothing with a BOS token per document, which separates them already; else the vocabulary's end-of-text
    token, else the EOS token, else a line end. ``eos`` and ``newline`` are these, anything else a token of the
    vocabulary. UserError for a token that the vocabulary lacks.
    """
    if separator == "auto" and bos == "document":
        return NOTHING
    if separator in ("auto", "eos", "newline"):
        ends = [token for token in END_OF_TEXT if separator == "auto" and _token_id(tokenizer, token) is not None]
        eos = [] if separator == "newline" or tokenizer.eos_token is None else [str(tokenizer.eos_token)]
        if separator == "eos" and not eos:
            raise UserError("the tokenizer has no EOS token; use --separator newline, none, or a token that it has")
        return [*ends, *eos, "\n"][0]
    if separator != NOTHING and _token_id(tokenizer, separator) is None:
        raise UserError(
            f"separator {separator!r} is no token of the vocabulary; give one that is, or auto, eos, newline or none"
        )
    return separator


def _token_id(tokenizer: Any, token: str) -> int | None:
    number = tokenizer.convert_tokens_to_ids(token)
    known = number is not None and (number != tokenizer.unk_token_id or token == tokenizer.unk_token)
    return number if known else None


def _separator_ids(separator: str, tokenizer: Any) -> list[int]:
    if separator == NOTHING:
        return []
    number = _token_id(tokenizer, separator)
    try:
        return encoded(tokenizer, separator)["input_ids"] if number is None else [number]
    except UserError as error:
        raise UserError(f"the tokenizer has no token for the separator {separator!r}; use --separator none") from error


def pack(
    source: TextSource,
    tokenizer: Any,
    length: int,
    bos: Bos,
    batch: int,
    separator: str = NOTHING,
    document_tokens: int | None = None,
    division: Division = UNDIVIDED,
    left_out: Counter[str] | None = None,
) -> Iterator[Contexts]:
    """Concatenate documents and cut them into contexts of ``length`` tokens, ``batch`` contexts at a time.

    ``bos="context"`` puts the BOS token at the start of every context, ``"document"`` at the start of every
    document that does not begin with it already, ``"none"`` nowhere. At the start of a document it has the role of a
    separator, and so no row. ``separator``, as :func:`resolve_separator` gives it, stands between documents. Chats go
    through the tokenizer's chat template, which may begin with BOS whatever ``bos`` says; those that the template
    refuses are left out. Of each document the first ``document_tokens`` tokens are taken. Tokens that do not fill a
    last context are dropped; the last batch may be short.

    The processes of a ``division`` share the tokenising, and all yield the same. ``left_out`` is kept at what the text
    that was used so far has left out, by reason.
    """
    prefix = 1 if bos == "context" else 0
    body = length - prefix
    if body < 1:
        raise UserError(f"context length {length} leaves no room for text; raise it")
    held: list[np.ndarray] = []
    count, wanted = 0, batch * body
    between = _separator_ids(separator, tokenizer)
    bos_id = bos_token_id(tokenizer) if bos == "document" else None
    groups = tokenized(source, tokenizer, division)
    for part in _tokens(groups, bos_id, between, document_tokens, Counter() if left_out is None else left_out):
        held.append(part)
        count += part.shape[1]
        while count >= wanted:
            flat = np.concatenate(held, axis=1)
            yield _contexts(flat[:, :wanted], body, bos_token_id(tokenizer) if prefix else None)
            held = [flat[:, wanted:]]
            count -= wanted
    if count >= body:
        flat = np.concatenate(held, axis=1)
        yield _contexts(flat[:, : count // body * body], body, bos_token_id(tokenizer) if prefix else None)


def _tokens(
    groups: Iterator[Group], bos_id: int | None, between: Sequence[int], most: int | None, left_out: Counter[str]
) -> Iterator[np.ndarray]:
    """``[3, m]``: token ids, document numbers and role numbers of a few documents at a time."""
    document, left = -1, 0
    for group in groups:
        left_out.clear()
        left_out.update(group.left_out)
        parts = []
        for starts, ids, roles in group.pieces:
            if starts and between and document >= 0:
                parts.append(_part(between, document, SEPARATOR))
            document += starts
            if most is not None:
                left = most if starts else left
                ids, roles = ids[:left], roles[:left]
                left -= len(ids)
            if starts and bos_id is not None:  # an attention sink, wherever in a context the document begins
                parts.append(_part([bos_id], document, SEPARATOR))
                own = int(list(ids[:1]) == [bos_id])
                ids, roles = ids[own:], roles[own:]
            parts.append(_part(ids, document, roles))
        if parts:
            yield np.concatenate(parts, axis=1)


def _part(ids: Sequence[int] | NDArray[np.int64], document: int, roles: int | NDArray[np.int64]) -> np.ndarray:
    return np.stack(np.broadcast_arrays(np.asarray(ids, dtype=np.int64), document, roles))


def _contexts(flat: np.ndarray, body: int, bos_id: int | None) -> Contexts:
    tokens, documents, roles = torch.from_numpy(flat.reshape(3, -1, body).copy())
    if bos_id is not None:
        tokens = torch.cat([torch.full((len(tokens), 1), bos_id), tokens], dim=1)
        documents = torch.cat([documents[:, :1], documents], dim=1)
        roles = torch.cat([torch.full((len(roles), 1), TEXT), roles], dim=1)
    return Contexts(tokens, documents, roles)

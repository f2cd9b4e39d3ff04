"""Pack documents into contexts of equal length."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Place:
    """Where a pass begins in a text: after ``tokens`` tokens of what the pieces from number ``pieces`` on give.

    ``document`` is the number of the document before that piece, and ``left`` how much may still be taken of it.
    """

    pieces: int = 0
    document: int = -1
    left: int = 0
    tokens: int = 0


BEGINNING = Place()


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
    at: Place = BEGINNING,
) -> Packed:
    """Concatenate documents and cut them into contexts of ``length`` tokens, ``batch`` contexts at a time.

    ``bos="context"`` puts the BOS token at the start of every context, ``"document"`` at the start of every
    document that does not begin with it already, ``"none"`` nowhere. At the start of a document it has the role of a
    separator, and so no row. ``separator``, as :func:`resolve_separator` gives it, stands between documents. Chats go
    through the tokenizer's chat template, which may begin with BOS whatever ``bos`` says; those that the template
    refuses are left out. Of each document the first ``document_tokens`` tokens are taken. Tokens that do not fill a
    last context are dropped; the last batch may be short.

    The processes of a ``division`` share the tokenising, and all yield the same. ``left_out`` is kept at what the text
    that was used so far has left out, by reason. ``at`` a place that an earlier packing of the same text has had, the
    passes from there on are yielded, and the pieces before it are not tokenised.
    """
    prefix = bos_token_id(tokenizer) if bos == "context" else None
    body = length - (prefix is not None)
    if body < 1:
        raise UserError(f"context length {length} leaves no room for text; raise it")
    between = _separator_ids(separator, tokenizer)
    bos_id = bos_token_id(tokenizer) if bos == "document" else None
    groups = tokenized(source, tokenizer, division, at.pieces)
    out = Counter() if left_out is None else left_out
    return Packed(_tokens(groups, bos_id, between, document_tokens, out, at), body, prefix, batch * body, at)


class Packed(Iterator[Contexts]):
    """Batches of contexts, and in ``place`` where the next one begins."""

    def __init__(
        self, parts: Iterator[tuple[Place, np.ndarray]], body: int, prefix: int | None, wanted: int, at: Place
    ) -> None:
        self.place = at
        self._parts, self._body, self._prefix, self._wanted = parts, body, prefix, wanted
        self._batches = self._cut()

    def __next__(self) -> Contexts:
        return next(self._batches)

    def _cut(self) -> Iterator[Contexts]:
        rest = np.empty((3, 0), np.int64)
        used = drop = self.place.tokens
        read, starts = 0, deque[tuple[Place, int]]()  # of the parts whose tokens are not all used, the first token
        for origin, part in self._parts:
            starts.append((origin, read))
            read += part.shape[1]
            flat = np.concatenate([rest, part[:, drop:]], axis=1)
            drop = max(drop - part.shape[1], 0)
            cuts = range(self._wanted, flat.shape[1] + 1, self._wanted)
            for cut in cuts:
                used += self._wanted
                while len(starts) > 1 and starts[1][1] <= used:
                    starts.popleft()
                self.place = replace(starts[0][0], tokens=used - starts[0][1])
                yield self._contexts(flat[:, cut - self._wanted : cut])
            rest = flat[:, len(cuts) * self._wanted :]
        if (whole := rest.shape[1] // self._body * self._body) > 0:
            self.place = replace(self.place, tokens=self.place.tokens + whole)
            yield self._contexts(rest[:, :whole])

    def _contexts(self, flat: np.ndarray) -> Contexts:
        tokens, documents, roles = torch.from_numpy(flat.reshape(3, -1, self._body).copy())
        if self._prefix is not None:
            tokens = torch.cat([torch.full((len(tokens), 1), self._prefix), tokens], dim=1)
            documents = torch.cat([documents[:, :1], documents], dim=1)
            roles = torch.cat([torch.full((len(roles), 1), TEXT), roles], dim=1)
        return Contexts(tokens, documents, roles)


def _tokens(
    groups: Iterator[Group], bos_id: int | None, between: Sequence[int], most: int | None, left_out: Counter[str],
    at: Place,
) -> Iterator[tuple[Place, np.ndarray]]:  # fmt: skip
    """Where a few documents at a time begin, and their token ids, document numbers and role numbers, ``[3, m]``."""
    now = replace(at, tokens=0)
    for group in groups:
        left_out.clear()
        left_out.update(group.left_out)
        document, left, parts = now.document, now.left, []
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
            yield now, np.concatenate(parts, axis=1)
        now = Place(now.pieces + group.read, document, left)


def _part(ids: Sequence[int] | NDArray[np.int64], document: int, roles: int | NDArray[np.int64]) -> np.ndarray:
    return np.stack(np.broadcast_arrays(np.asarray(ids, dtype=np.int64), document, roles))

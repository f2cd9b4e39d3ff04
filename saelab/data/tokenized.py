"""Text as token ids, a group of documents at a time; several processes tokenise a group each and tell one another.

A group is the smallest number of pieces of text with ``GROUP`` characters or more (the first ones are smaller, for
those who need no more than a beginning), so that the same text falls into the same groups in every process: group ``g``
belongs to process ``g % size``. All processes read the text, which is cheap; only the owner of a group renders its
chats and tokenises it. What a piece gives does not depend on the group that it is in.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from saelab.data.chat import SEPARATOR, TEXT, Rendered, render, roles_of, shows_tools
from saelab.data.text.source import Chat, Document, TextSource
from saelab.errors import UserError
from saelab.vocabulary import bos_token_id, encoded

GROUP = 1 << 20  # characters handed to the tokenizer at a time: it works on them in parallel
FIRST_GROUP = 1 << 16  # characters of the first group; each one after it has twice as many, up to GROUP
Piece = tuple[bool, Document]  # starts a document, text or chat


@dataclass(frozen=True)
class Division:
    """This process's part in the tokenising that ``size`` processes share.

    ``exchange`` gives each process's bytes to all, in the order of their ranks; all must call it equally often.
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[bytes], list[bytes]] = lambda data: [data]


UNDIVIDED = Division()


class Tokens(NamedTuple):
    """Token ids and role numbers of a piece of text."""

    starts: bool  # a document
    ids: NDArray[np.int64]
    roles: NDArray[np.int64]


class Group(NamedTuple):
    """The pieces of a group, how many the source gave for it, and what has been left out of the text up to its end."""

    pieces: list[Tokens]
    read: int
    left_out: Counter[str]  # by reason


def tokenized(source: TextSource, tokenizer: Any, division: Division = UNDIVIDED, skip: int = 0) -> Iterator[Group]:
    """The groups of a text in order, the same in every process of ``division``.

    The first ``skip`` pieces are read, but not tokenised. UserError, in all processes, where one cannot tokenise its
    part.
    """
    groups = _grouped(source, skip)
    refused: Counter[str] = Counter()
    while round_ := list(itertools.islice(groups, division.size)):
        own = round_[division.rank][0] if division.rank < len(round_) else []
        if division.size == 1:
            found = [_tokenize(own, tokenizer)]
        else:
            found = [_unpacked(data) for data in division.exchange(_packed(own, tokenizer))]
        for (group, left_out), (pieces, without) in zip(round_, found):
            refused += without
            yield Group(pieces, len(group), left_out + refused)


def _grouped(source: TextSource, skip: int) -> Iterator[tuple[list[Piece], Counter[str]]]:
    """Groups, each with what reading has left out up to its end."""
    group: list[Piece] = []
    size, least, pieces = 0, min(FIRST_GROUP, GROUP), source.pieces()
    if (there := sum(1 for _ in itertools.islice(pieces, skip))) < skip:
        raise UserError(
            f"{source.name} ends after {there:,} documents or parts of them, and {skip:,} were read before: it has "
            "changed; give the text as it was, or start again with --overwrite"
        )
    for starts, piece in pieces:
        group.append((starts, piece))
        size += len(piece) if isinstance(piece, str) else sum(len(message["content"]) for message in piece)
        if size >= least:
            yield group, Counter(source.left_out)
            group, size, least = [], 0, min(2 * least, GROUP)
    yield group, Counter(source.left_out)  # empty too: reading may have left something out behind the last group


def _tokenize(group: Sequence[Piece], tokenizer: Any) -> tuple[list[Tokens], Counter[str]]:
    """The pieces of a group, and how many chats and lists of tools the template leaves out, by reason."""
    pieces: list[tuple[bool, str | Rendered]] = []
    refused: Counter[str] = Counter()
    for starts, piece in group:
        if not isinstance(piece, str):
            try:
                rendered = render(tokenizer, piece)
                if isinstance(piece, Chat) and piece.tools and not shows_tools(tokenizer, piece):
                    refused["lists of tools that the chat template does not show"] += 1
            except UserError:
                raise
            except ValueError as error:
                refused[f"chats that the template refuses ({error})"] += 1
                continue
            piece = rendered
        pieces.append((starts, piece))
    return (list(_encoded(pieces, tokenizer)) if pieces else []), refused


def _encoded(group: Sequence[tuple[bool, str | Rendered]], tokenizer: Any) -> Iterator[Tokens]:
    chats = any(isinstance(piece, Rendered) for _, piece in group)
    if chats and not tokenizer.is_fast:
        raise UserError("chats need a fast tokenizer, which tells the place of each token; give text instead")
    texts = [piece.text if isinstance(piece, Rendered) else piece for _, piece in group]
    options = {"return_offsets_mapping": True} if chats else {}
    found = encoded(tokenizer, texts, verbose=False, **options)
    bos_id = bos_token_id(tokenizer) if chats else None
    for number, (starts, piece) in enumerate(group):
        ids = np.asarray(found["input_ids"][number], dtype=np.int64)
        if isinstance(piece, str):
            yield Tokens(starts, ids, np.full(len(ids), TEXT))
            continue
        roles = np.asarray(roles_of(found["offset_mapping"][number], piece.spans), dtype=np.int64)
        if len(ids) and ids[0] == bos_id and bos_id not in ids[1:]:  # else it begins every message, as <|im_start|> may
            roles[0] = SEPARATOR  # an attention sink
        yield Tokens(starts, ids, roles)


def _packed(group: Sequence[Piece], tokenizer: Any) -> bytes:
    """A tokenised group as bytes, or the reason why it cannot be."""
    pieces: list[Tokens] = []
    refused: Counter[str] = Counter()
    reason = ""
    try:
        pieces, refused = _tokenize(group, tokenizer)
    except UserError as error:  # all processes end with the same line, instead of waiting for this one
        reason = str(error)
    about = json.dumps({"error": reason, "refused": refused}).encode()
    columns = {
        "about": np.frombuffer(about, dtype=np.uint8),
        "starts": np.array([piece.starts for piece in pieces], dtype=np.bool_),
        "lengths": np.array([len(piece.ids) for piece in pieces], dtype=np.int64),
        "ids": np.concatenate([np.empty(0, np.int32), *(piece.ids.astype(np.int32) for piece in pieces)]),
        "roles": np.concatenate([np.empty(0, np.int8), *(piece.roles.astype(np.int8) for piece in pieces)]),
    }
    return safetensors.numpy.save(columns)


def _unpacked(data: bytes) -> tuple[list[Tokens], Counter[str]]:
    columns = safetensors.numpy.load(data)
    about = json.loads(columns["about"].tobytes())
    if about["error"]:
        raise UserError(about["error"])
    ends = np.cumsum(columns["lengths"])[:-1]
    ids, roles = (np.split(columns[name].astype(np.int64), ends) for name in ("ids", "roles"))
    starts = columns["starts"].tolist()
    return [Tokens(*piece) for piece in zip(starts, ids, roles)] if starts else [], Counter(about["refused"])

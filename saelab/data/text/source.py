"""What a source of text is: documents, their name, and a count of what was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # role and content, which are text, and what else the chat template reads


class Chat(list[Message]):
    """Messages, and the definitions of the tools that their record lists for the chat template."""

    def __init__(self, messages: Iterable[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(messages)
        self.tools = list(tools)


Document = str | list[Message]
Pieces = Iterator[tuple[bool, Document]]


@dataclass(frozen=True)
class TextSource:
    """Documents, their name, and a fingerprint that changes when they do.

    ``pieces`` yields ``(starts a document, text)``: long plain-text files come in several pieces, so that no file has
    to fit in memory. A chat is one piece, a list of messages ``{"role": ..., "content": ...}``. ``left_out`` counts
    what the latest reading passed over, by reason.
    """

    name: str
    fingerprint: str
    pieces: Callable[[], Pieces]
    left_out: Counter[str] = field(default_factory=Counter, compare=False)

    def documents(self) -> Iterator[Document]:
        """Whole documents."""
        parts: list[str] = []
        for starts, piece in self.pieces():
            if starts and parts:
                yield "".join(parts)
                parts = []
            if isinstance(piece, str):
                parts.append(piece)
            else:
                yield piece
        if parts:
            yield "".join(parts)


def counted(name: str, fingerprint: str, read: Callable[[Counter[str]], Pieces]) -> TextSource:
    """A source whose ``read`` is given the counter of what it leaves out, empty at the start of each reading."""
    left_out: Counter[str] = Counter()

    def pieces() -> Pieces:
        left_out.clear()
        yield from read(left_out)

    return TextSource(name, fingerprint, pieces, left_out)


def listed(left_out: Counter[str] | dict[str, int]) -> str:
    """``3 records without 'text', 2 empty files``: what was left out, the most frequent reason first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    ordered = [
        (n, reason if n > 1 else re.sub(r"\b(record|file|chat|list)s\b", r"\1", reason, count=1))
        for reason, n in ordered
    ]
    return ", ".join(f"{count:,} {reason}" for count, reason in ordered)

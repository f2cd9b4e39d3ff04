"""The text of token ids, alone and side by side, without the tokenizer that made them.

A token may hold only some of the bytes of a character: with a byte-level vocabulary most characters of most scripts are
two to four tokens. Side by side the character is shown with the token that completes it, and the tokens before it are
empty; joined they are the text. Alone, and where a character was cut, such bytes are shown as ``<E3 81>``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

_HEX = "saelab.hex"


def _as_hex(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return hexadecimal(error.object[error.start : error.end]), error.end


codecs.register_error(_HEX, _as_hex)


def hexadecimal(data: bytes) -> str:
    """``<E3 81>``."""
    return f"<{data.hex(' ').upper()}>"


def storable(text: str) -> str:
    """``text`` in a form that a file can hold: halves of characters, as some vocabularies give, become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Vocabulary(Sequence[str]):
    """The text of each token id; ``parts`` holds the bytes of those that are no whole characters.

    ``vocabulary[id]`` is the text of the token alone; a token that usually begins a word has its space. Ids behind the
    last have no text of their own and are shown as ``<id>``.
    """

    def __init__(self, texts: Sequence[str], parts: Mapping[int, bytes] | None = None) -> None:
        self.parts = dict(parts or {})
        self.texts = [storable(text) for text in texts]
        for number, data in self.parts.items():
            self.texts[number] = data.decode("utf-8", _HEX)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: Any) -> Any:
        return self.texts[number]

    def alone(self, number: int) -> str:
        """The text of one token."""
        return self.texts[number] if number < len(self.texts) else f"<{number}>"

    def side_by_side(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a run of text: a character belongs to the token that completes it."""
        shown, run = [], 0
        for end, number in enumerate([*ids, None]):
            if number is not None and number in self.parts:
                continue
            if end > run:
                shown += self.complete(ids[run:end])
            if number is not None:
                shown.append(self.alone(number))
            run = end + 1
        return shown

    def complete(self, ids: Sequence[int]) -> list[str]:
        """The text of each of several tokens that all have ``parts``."""
        decoder = codecs.getincrementaldecoder("utf-8")(_HEX)
        last = len(ids) - 1
        return [decoder.decode(self.parts[number], final=place == last) for place, number in enumerate(ids)]

    def to_json(self) -> str:
        """A list with the text of each token, or the list of its bytes where they are no whole characters."""
        entries = [list(self.parts[n]) if n in self.parts else text for n, text in enumerate(self.texts)]
        return json.dumps(entries, ensure_ascii=False)

    @classmethod
    def from_json(cls, data: str | bytes) -> Vocabulary:
        """What :meth:`to_json` wrote, or a list of texts, as 0.1.0 wrote. ValueError for anything else."""
        entries = json.loads(data)
        parts = {number: bytes(entry) for number, entry in enumerate(entries) if isinstance(entry, list)}
        return cls(["" if isinstance(entry, list) else str(entry) for entry in entries], parts)

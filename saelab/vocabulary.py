"""The text of token ids, alone and side by side, without the tokenizer that made them.

A token may hold only some of the bytes of a character: with a byte-level vocabulary most characters of most scripts are
two to four tokens. Side by side the character is shown with the token that completes it, and the tokens before it are
empty; joined they are the text. Alone, and where a character was cut, such bytes are shown as ``<E3 81>``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saelab.errors import UserError, first_line

# In text decoded with surrogateescape: one character, or bytes that belong to none.
_PIECES = re.compile("[\udc80-\udcff]+|.", re.DOTALL)


def hexadecimal(data: bytes) -> str:
    """``<E3 81>``."""
    return f"<{data.hex(' ').upper()}>"


def storable(text: str) -> str:
    """``text`` in a form that a file can hold: halves of characters, as some vocabularies give, become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _characters(data: bytes) -> Iterator[tuple[int, int, str]]:
    """(first byte, last byte + 1, text) of each character, and of each run of bytes that belong to none."""
    stop = 0
    for piece in _PIECES.findall(data.decode("utf-8", "surrogateescape")):
        raw = piece.encode("utf-8", "surrogateescape")
        start, stop = stop, stop + len(raw)
        yield start, stop, hexadecimal(raw) if "\udc80" <= piece[0] <= "\udcff" else piece


def encoded(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """What a tokenizer of transformers makes of one text or several, without special tokens.

    Halves of characters, which JSON and command lines may hold and no tokenizer takes, are replaced (:func:`storable`).
    UserError for text that the tokenizer cannot read, as one without a token for unknown words.
    """
    try:
        whole = storable(texts) if isinstance(texts, str) else [storable(text) for text in texts]
        return tokenizer(whole, add_special_tokens=False, **options)
    except Exception as error:  # tokenizers have no class of their own for it
        raise UserError(f"the tokenizer cannot read this text ({first_line(error)}); use the model's own") from error


def bos_token_id(tokenizer: Any) -> int | None:
    """The id of the token that a model's texts begin with; None where its tokenizer has no such token.

    TransformerLens gives the tokenizer of a bridge its end-of-text token as BOS token where it has none. What the
    tokenizer was loaded with tells. A tokenizer that itself puts another token than its BOS token in front of a text
    (XGLM and BioGPT, whose models have never seen ``<s>``, put ``</s>``) knows better.
    """
    loaded = getattr(tokenizer, "init_kwargs", None) or {}
    is_end = tokenizer.bos_token_id == getattr(tokenizer, "eos_token_id", None)
    borrowed = is_end and "eos_token" in loaded and loaded.get("bos_token") is None
    if borrowed or tokenizer.bos_token_id is None:
        return None
    try:
        alone, text = encoded(tokenizer, "a")["input_ids"], tokenizer("a")["input_ids"]
    except UserError:  # a vocabulary without letters
        return tokenizer.bos_token_id
    return int(text[0]) if alone and text[1 : 1 + len(alone)] == alone else tokenizer.bos_token_id


class Vocabulary(Sequence[str]):
    """The text of each token id; ``parts`` holds the bytes of those that are no whole characters.

    ``vocabulary[id]`` is the text of the token alone, with its space if it begins a word. Ids behind the last have no
    text of their own; :meth:`alone` gives ``<id>`` for them.
    """

    def __init__(self, texts: Sequence[str], parts: Mapping[int, bytes] | None = None) -> None:
        self.parts = dict(parts or {})
        self.texts = [storable(text) for text in texts]
        for number, data in self.parts.items():
            self.texts[number] = "".join(text for *_, text in _characters(data))
        self._run = functools.lru_cache(maxsize=1 << 16)(self._read_run)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: Any) -> Any:
        return self.texts[number]

    def alone(self, number: int) -> str:
        """The text of one token."""
        return self.texts[number] if number < len(self.texts) else f"<{number}>"

    def side_by_side(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a run of text: a character belongs to the token that completes it."""
        shown, start = [], 0
        for place, number in enumerate([*ids, None]):
            if number is not None and number in self.parts:
                continue
            if place > start:
                shown += self.run(tuple(ids[start:place]))[0]
            if number is not None:
                shown.append(self.alone(number))
            start = place + 1
        return shown

    def run(self, ids: tuple[int, ...]) -> tuple[list[str], list[str]]:
        """Of each of several tokens that all have ``parts``: the characters that it completes, and all those of which
        it has a byte."""
        return self._run(ids)

    def _read_run(self, ids: tuple[int, ...]) -> tuple[list[str], list[str]]:
        found = list(_characters(b"".join(self.parts[number] for number in ids)))
        completed, touched, start, first = [], [], 0, 0
        for number in ids:
            stop = start + len(self.parts[number])
            while first < len(found) and found[first][1] <= start:
                first += 1
            here = []
            for piece in found[first:]:
                if piece[0] >= stop:
                    break
                here.append(piece)
            completed.append("".join(text for _, end, text in here if end <= stop))
            touched.append("".join(text for *_, text in here))
            start = stop
        return completed, touched

    def to_json(self) -> str:
        """A list with the text of each token, or the list of its bytes where they are no whole characters."""
        entries = [list(self.parts[n]) if n in self.parts else text for n, text in enumerate(self.texts)]
        return json.dumps(entries, ensure_ascii=False)

    @classmethod
    def from_json(cls, data: str | bytes) -> Vocabulary:
        """What :meth:`to_json` wrote, or a list of texts, as 0.1.0 wrote. ValueError for anything else."""
        entries = json.loads(data)
        if not isinstance(entries, list):
            raise ValueError("not a list of tokens")
        parts = {number: bytes(entry) for number, entry in enumerate(entries) if isinstance(entry, list)}
        return cls(["" if isinstance(entry, list) else str(entry) for entry in entries], parts)

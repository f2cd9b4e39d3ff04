"""Convert text to token ids, and token ids to readable text.

Tokenizers are those of ``transformers``; special tokens are added here and never by the tokenizer. Contexts of an
activation cache are packed by :mod:`saelab.data.packing`, which is given a tokenizer and does not import language
models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.structure import underlying
from saelab.vocabulary import Vocabulary, bos_token_id, encoded

Prompts = str | Sequence[str]


def tokenizer_of(model: nn.Module, tokenizer: Any = None) -> Any:
    """The tokenizer given, or the model's own; UserError where there is none."""
    found = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if found is None:
        raise UserError(f"{type(model).__name__} carries no tokenizer; give tokenizer=...")
    return found


def end_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text or a turn: those of the model's generation settings and of its configuration, which
    may name several, and the tokenizer's EOS token; sorted, empty where none is known."""
    root, found = underlying(model), set[int]()
    config = getattr(root, "config", None)
    for holder in (getattr(root, "generation_config", None), config, getattr(config, "text_config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found |= {int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None}
    return tuple(sorted(found))


def token_ids(tokenizer: Any, text: str, bos: bool = True) -> list[int]:
    """The ids of a text; with ``bos`` they begin with the tokenizer's BOS token, where it has one.

    A text that already begins with it (a chat template) gets no second one.
    """
    ids = list(encoded(tokenizer, text)["input_ids"])
    start = bos_token_id(tokenizer)
    return ids if not bos or start is None or ids[:1] == [start] else [start, *ids]


def tokenize(tokenizer: Any, prompts: Prompts) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Token ids and attention mask of one text or several, padded on the left.

    Each text begins with the BOS token, as the contexts of an activation cache do by default; to decide it yourself
    give token ids to :func:`saelab.steering.generation.generate_tokens`. UserError for a text without a token.
    """
    rows = [token_ids(tokenizer, prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    if not rows or not all(rows):
        raise UserError("a prompt needs at least one token")
    # The value is never read, since the mask hides it; a tokenizer without a padding token need not be changed.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return padded(rows, padding)


def padded(
    rows: Sequence[Sequence[int]], fill: int = 0
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Rows of token ids, or of other numbers, padded on the left with ``fill``, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def decode_each(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token in its place: what it adds to the decoded text before it.

    A character spread over several tokens belongs to the last of them; the others are empty. Bytes at the end that are
    no whole character, where a text was cut, are shown as ``<E3 81>``.
    """
    strings, shown, whole, since = [], "", "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        cut = _cut(tokenizer, ids[since:end]) if text.endswith("\ufffd") else b""
        if not cut:
            whole, since = text, end
        elif end < len(ids):
            text = text.rstrip("\ufffd")
            text = text if len(text) > len(shown) else shown
        else:
            text = whole + Vocabulary([""], {0: cut})[0]
        strings.append(text[len(shown) :])
        shown = text
    return strings


def _cut(tokenizer: Any, ids: Sequence[int]) -> bytes:
    """The bytes of tokens that do not end with a whole character; nothing if they do."""
    parts = [_bytes(tokenizer, number) for number in ids]
    data = b"".join(part for part in parts if part is not None)
    return b"" if None in parts or _whole(data) else data


def written_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens and without a character that is cut at the end."""
    whole = text = tokenizer.decode(ids, skip_special_tokens=True)
    # A character has at most four bytes. SentencePiece gives up the whole run of bytes for one that is cut.
    for stop in range(len(ids) - 1, max(len(ids) - 4, -1), -1):
        if not text.endswith("\ufffd") or _bytes(tokenizer, int(ids[stop])) is None:
            return text
        text = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return whole if text.endswith("\ufffd") else text


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The text of each token id of the vocabulary as it reads within a text, and the bytes of parts of characters."""
    size = max(tokenizer.get_vocab().values()) + 1
    # Decoders treat the first token otherwise than the rest: they strip its space, or keep the ## of a word's middle.
    try:
        front = encoded(tokenizer, "a")["input_ids"][-1:]
    except UserError:  # a vocabulary without letters
        front = []
    before = tokenizer.decode(front, clean_up_tokenization_spaces=False) if front else ""
    texts = tokenizer.batch_decode([[*front, i] for i in range(size)], clean_up_tokenization_spaces=False)
    texts = [
        text[len(before) :] if text.startswith(before) else tokenizer.decode([i], clean_up_tokenization_spaces=False)
        for i, text in enumerate(texts)
    ]
    cut = [i for i, text in enumerate(texts) if "\ufffd" in text]
    found = {i: _bytes(tokenizer, i) for i in cut}
    return Vocabulary(texts, {i: data for i, data in found.items() if data is not None})


def token_text(tokenizer: Any, number: int) -> str:
    """The text of one token alone."""
    text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    data = _bytes(tokenizer, number) if "\ufffd" in text else None
    return text if data is None else Vocabulary([""], {0: data})[0]


def _bytes(tokenizer: Any, number: int) -> bytes | None:
    """The bytes of a token that is no whole character; None for any other."""
    piece = tokenizer.convert_ids_to_tokens(number) or ""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # SentencePiece's fallback
        data = bytes.fromhex(match[1])
    elif piece and all(char in _BYTE_OF for char in piece):  # byte-level vocabularies
        data = bytes(_BYTE_OF[char] for char in piece)
    else:
        return None
    return None if _whole(data) else data


def _whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones stand for themselves, the others, in
    order, are the letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()

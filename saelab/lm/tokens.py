"""Convert text to token ids, and token ids to readable text.

Tokenizers are those of ``transformers``; special tokens are added here and never by the tokenizer. Contexts of an
activation cache are packed by :mod:`saelab.data.packing`, which is given a tokenizer and does not import language
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saelab.errors import UserError

Prompts = str | Sequence[str]


def tokenizer_of(model: nn.Module, tokenizer: Any = None) -> Any:
    """The tokenizer given, or the model's own; UserError where there is none."""
    found = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if found is None:
        raise UserError(f"{type(model).__name__} carries no tokenizer; give tokenizer=...")
    return found


def token_ids(tokenizer: Any, text: str, bos: bool = True) -> list[int]:
    """The ids of a text; with ``bos`` they begin with the tokenizer's BOS token, where it has one.

    A text that already begins with it (a chat template) gets no second one.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = tokenizer.bos_token_id
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
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def decode_each(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token in its place: what it adds to the decoded text before it.

    A character spread over several tokens belongs to the last of them; the others are empty.
    """
    strings, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            strings.append("")
            continue
        strings.append(text[len(shown) :])
        shown = text
    return strings


def token_strings(tokenizer: Any) -> list[str]:
    """The text of each token id of the vocabulary; a token that is part of a character becomes U+FFFD."""
    size = max(tokenizer.get_vocab().values()) + 1
    texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    # SentencePiece vocabularies mark a leading space, which decoding a token on its own strips.
    return [
        f" {text}" if (piece or "").startswith("▁") and not text.startswith(" ") else text
        for text, piece in zip(texts, pieces)
    ]

"""What a model cannot read: token ids outside its embedding, and texts longer than its positions."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.structure import modules, text_config, underlying

_log = logging.getLogger(__name__)
_BY_DISTANCE = {"bloom", "xglm"}  # ALiBi, and a table of sines that grows


def check_tokens(model: nn.Module, ids: Tensor, tokenizer: Any = None) -> None:
    """UserError if ``ids`` contains one that the embedding of ``model`` does not have."""
    found: Any = underlying(model)
    embedding = found.get_input_embeddings() if hasattr(found, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None) or getattr(text_config(model), "vocab_size", None)
    if rows is None or ids.numel() == 0 or int(ids.max()) < rows:
        return
    token = int(ids.max())
    text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
    raise UserError(
        f"the tokenizer gives token {token}{text}, the model's embedding has {rows} rows; use the model's own "
        "tokenizer, or resize the embedding (resize_token_embeddings)"
    )


def check_length(model: nn.Module, length: int, what: str = "a text") -> None:
    """UserError if ``length`` tokens are more than the table of positions of ``model`` holds.

    Rotary positions have no table: past the length that the model was made for it runs on, but was never trained
    there, which a warning says.
    """
    limit, is_table = position_limit(model)
    if limit is None or length <= limit:
        return
    if is_table:
        raise UserError(f"{what} of {length} tokens is longer than the {limit} positions of the model; shorten it")
    _log.warning(
        "%s of %d tokens is longer than the %d that the model was made for; expect poor predictions",
        what,
        length,
        limit,
    )


def position_limit(model: nn.Module) -> tuple[int | None, bool]:
    """The longest text a model was made for, and whether it has a table of so many positions; None for no limit."""
    config: Any = text_config(model)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if (
        not isinstance(limit, int)
        or getattr(config, "model_type", "") in _BY_DISTANCE
        or getattr(config, "alibi", False)
    ):
        return None, False
    rotary = any(path.rpartition(".")[2] in ("rotary_emb", "rotary_embed") for path, _ in modules(model))
    return limit, not rotary

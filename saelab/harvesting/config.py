"""The settings of a harvest; the command line shows the same names and defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from saelab.data.chat import check_roles
from saelab.data.packing import Bos
from saelab.devices import DTYPES
from saelab.errors import UserError, near_matches

ALL_SHARDS = 1 << 30  # bytes of the shards of all hook points that are being filled
PASS, LARGEST_PASS = 2048, 1 << 15  # tokens of a forward pass


def largest_pass(model: nn.Module, free: float, gradients: bool) -> int:
    """Tokens of a pass that takes at most ``free`` bytes: a power of two between ``PASS`` and ``LARGEST_PASS``.

    A pass holds about sixteen vectors of the residual stream's width per token and layer that is kept: two layers
    without gradients, all with them; and, with gradients, logits, in float32 and as they are.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = next(model.parameters()).element_size()
    layers = config.num_hidden_layers if gradients else 2
    token = 16 * layers * config.hidden_size * size + (gradients and config.vocab_size * (8 + 2 * size))
    tokens = PASS
    while tokens < LARGEST_PASS and 2 * tokens * token <= free:
        tokens *= 2
    return tokens


@dataclass(frozen=True)
class HarvestConfig:
    """What to run and what to keep."""

    tokens: int = 200_000
    """Tokens of text to run through the model; the text may end earlier."""
    context_length: int = 128
    """Tokens in a context."""
    bos: Bos | Literal["auto"] = "auto"
    """Where the tokenizer's BOS token goes: at the start of each context, of each document (there without a stored
    row), or nowhere; auto is context where there is a BOS token."""
    separator: str = "auto"
    """What stands between two documents, without a stored row: eos, newline, none, or a token of the vocabulary; auto
    is the end-of-text or EOS token of the vocabulary, else a line end, and nothing with a BOS token per document."""
    roles: tuple[str, ...] = ()
    """Of chats, keep only tokens of these roles: system, developer, user, assistant, tool, other, template (the chat
    template's own), text (documents that are no chats); by default all."""
    skip_first: int = 1
    """Positions at the start of each context that are not stored: the first is an attention sink, unlike the rest."""
    max_norm: float | None = None
    """Leave out tokens whose activation has a larger Euclidean norm."""
    gradients: bool = False
    """Also store the gradient of the next-token loss, summed over positions."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Precision on disk."""
    held_out: float = 0.05
    """Share of the contexts kept out of training: the documents at the end that make up about so much."""
    pass_tokens: int | None = None
    """Tokens in one forward pass; by default 2048, and on a CUDA GPU up to 32768, as its memory and the model allow."""
    shard_bytes: int = 64 << 20
    """Size of a shard: what an interrupted harvest can lose."""
    document_tokens: int | None = None
    """At most so many tokens of each document, from its start; by default all. A few long documents then leave room for
    more others."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context_length", "pass_tokens", "shard_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.document_tokens is not None and self.document_tokens < 1:
            raise UserError(f"document_tokens={self.document_tokens} must be at least 1")
        if not 0 <= self.skip_first < self.context_length:
            raise UserError(f"skip_first={self.skip_first} must be below context_length={self.context_length}")
        check_roles(self.roles)
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; {near_matches(self.dtype, DTYPES)}")

    @property
    def contexts(self) -> int:
        """Contexts that hold ``tokens``; the last may be cut."""
        return math.ceil(self.tokens / self.context_length)

    @property
    def pass_contexts(self) -> int:
        """Contexts in one forward pass."""
        return max((self.pass_tokens or PASS) // self.context_length, 1)

    def sized(self, model: nn.Module) -> HarvestConfig:
        """The same settings with a size of the passes for the device that the model is on.

        It depends on the size of that memory, not on what is free: a harvest that is resumed must cut its passes, and
        so its shards, as before.
        """
        device = next(model.parameters()).device
        if self.pass_tokens is not None or device.type != "cuda":
            return replace(self, pass_tokens=self.pass_tokens or PASS)
        total = torch.cuda.get_device_properties(device).total_memory
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return replace(self, pass_tokens=largest_pass(model, (total - weights) / 4, self.gradients))

    def shard_passes(self, d_in: int, hooks: int = 1) -> int:
        """Forward passes whose rows make up one shard; fewer where a shard of each of many hook points is in memory."""
        row_bytes, size = d_in * getattr(torch, self.dtype).itemsize, min(self.shard_bytes, ALL_SHARDS // hooks)
        return max(size // (row_bytes * self.context_length * self.pass_contexts), 1)

"""The tokens of a forward pass: prompt or generated, and their distance from the start of their text.

A block sees only a chunk ``[batch, length]``: the whole text in a prefill or an uncached step, one token in a cached
step, with padding on the left in a batch. Steering must have the same effect in all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saelab.data.chat import ROLES
from saelab.errors import UserError
from saelab.lm.sites import underlying

# "answer" and "instruction" are the assistant's and the user's messages of a chat.
PHASES = ("prompt", "generated")
MESSAGES = {"answer": ROLES.index("assistant"), "instruction": ROLES.index("user")}
_NAMED = ("all", *PHASES, *MESSAGES)


@dataclass(frozen=True)
class TokenContext:
    """The tokens of one forward pass."""

    batch: int
    past: int  # columns already in the cache
    length: int
    order: Int[Tensor, "batch length"] | None  # of each token among the real ones of its row; None without padding
    real: Bool[Tensor, "batch length"] | None  # False on padding; None where there is none in this pass
    prompt_length: int  # columns of the prompt, padding included
    prompt_tokens: Int[Tensor, " batch"] | None  # real tokens in each row's prompt; None without padding
    tokens: Int[Tensor, "batch length"] | None
    device: torch.device
    roles: Int[Tensor, "batch length"] | None = None  # places in saelab.data.chat.ROLES; None outside a chat

    @property
    def slots(self) -> Int[Tensor, " length"]:
        """The column of each token in the padded text."""
        return torch.arange(self.past, self.past + self.length, device=self.device)

    @property
    def positions(self) -> Int[Tensor, "batch length"]:
        """Distance of each token from its text's first token, padding not counted; negative on padding."""
        return self.slots.expand(self.batch, -1) if self.order is None else self.order

    @property
    def generated(self) -> Bool[Tensor, "batch length"]:
        """Which tokens the model wrote itself."""
        return (self.slots >= self.prompt_length).expand(self.batch, -1)

    def select(self, where: Where, skip_first: bool = False) -> Tensor | bool:
        """A mask ``[batch, length]``, or True or False when it is the same everywhere. Padding is never selected."""
        chosen = self._named(where) if isinstance(where, str) else self._mask(where)
        if chosen is False:
            return False
        masks = [] if chosen is True else [chosen]
        if self.real is not None:
            masks.append(self.real)
        if skip_first and (self.order is not None or self.past == 0):
            masks.append(self.positions != 0)
        if not masks:
            return True
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        return mask

    def _named(self, where: str) -> Tensor | bool:
        if where == "all":
            return True
        if where in MESSAGES:
            if self.roles is None:
                raise UserError(
                    f"where={where!r} means messages of a chat, and this text is none; use Chat or answer_chats "
                    "(--chat), or where='prompt' or 'generated'"
                )
            return self.roles == MESSAGES[where]
        # One phase only, as in every cached step.
        if self.past >= self.prompt_length or self.past + self.length <= self.prompt_length:
            return (self.past >= self.prompt_length) == (where == "generated")
        return self.generated if where == "generated" else ~self.generated

    def _mask(self, where: Sequence[int] | Callable[[TokenContext], Tensor]) -> Tensor:
        if callable(where):
            mask = where(self)
            if mask.dtype != torch.bool or mask.shape != (self.batch, self.length):
                raise UserError(
                    f"the token predicate returned {mask.dtype} {tuple(mask.shape)}; it must return a bool mask "
                    f"[{self.batch}, {self.length}]"
                )
            return mask
        wanted = torch.tensor([p for p in where if p >= 0], device=self.device)
        before = torch.tensor([p for p in where if p < 0], device=self.device)
        ends = self.prompt_length if self.prompt_tokens is None else self.prompt_tokens[:, None]
        return torch.isin(self.positions, wanted) | torch.isin(self.positions - ends, before)


# "all", "prompt", "generated", "answer", "instruction", positions in the text, or a predicate that returns a mask
# [batch, length].
Where = str | Sequence[int] | Callable[[TokenContext], Tensor]


def check_where(where: Where) -> Where:
    """``where`` if it names tokens that steering can find."""
    if isinstance(where, str) and where not in _NAMED:
        raise UserError(f"where={where!r} is not one of {', '.join(_NAMED)}, a list of positions or a predicate")
    return where


class Positions:
    """Tracks a model's forward passes; ``now`` describes the current one."""

    def __init__(self) -> None:
        self._now: TokenContext | None = None
        self._depth = 0  # of nested calls of generate()
        self._prompt_length: int | None = None
        self._prompt_mask: Tensor | None = None  # the mask that generate() was given
        self._roles: Tensor | None = None  # of the prompt's tokens, in a chat

    @property
    def now(self) -> TokenContext:
        if self._now is None:
            raise UserError("steering hooks ran outside the model's own forward; call the model, not its blocks")
        return self._now

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[Positions]:
        """Watch the forward passes and ``generate`` calls of ``model`` until the block ends."""
        root = underlying(model)
        names = list(inspect.signature(root.forward).parameters)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._begin(dict(zip(names, args)) | kwargs)

        handle = root.register_forward_pre_hook(before, with_kwargs=True)
        holders = [holder for holder in {id(m): m for m in (model, root)}.values() if hasattr(holder, "generate")]
        saved = [holder.__dict__.get("generate") for holder in holders]
        try:
            for holder in holders:
                holder.__dict__["generate"] = self._wrap(getattr(holder, "generate"))  # noqa: B009 -- typed as a module
            yield self
        finally:
            handle.remove()
            for holder, previous in zip(holders, saved):
                holder.__dict__.pop("generate")
                if previous is not None:
                    holder.__dict__["generate"] = previous

    def _wrap(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        # Without a cache every step carries the whole text again: only the call itself knows where its prompt ended.
        @wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                self._prompt_length = _given_length(args, kwargs)
                self._prompt_mask = _flat_mask(kwargs.get("attention_mask"))
            self._depth += 1
            try:
                return generate(*args, **kwargs)
            finally:
                self._depth -= 1
                self._prompt_mask = None if self._depth == 0 else self._prompt_mask

        return wrapped

    @contextmanager
    def generating(self, prompt_length: int, roles: Int[Tensor, "batch prompt_length"] | None = None) -> Iterator[None]:
        """Treat the forward passes inside as one generation from a prompt of so many columns.

        ``roles`` are those of a chat's tokens, see :data:`saelab.data.chat.ROLES`; what is generated is the answer.
        """
        self._depth, self._prompt_length, self._roles = self._depth + 1, prompt_length, roles
        try:
            yield
        finally:
            self._depth, self._roles = self._depth - 1, None

    def _begin(self, given: dict[str, Any]) -> None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        carrier = ids if ids is not None else embeds
        if carrier is None:
            raise UserError("the model was called without input_ids or inputs_embeds; steering cannot place its tokens")
        batch, length = carrier.shape[:2]
        past = _past_length(given.get("past_key_values"))
        prompt_length = self._prompt_length
        if prompt_length is None or (past == 0 and self._depth == 0):
            self._prompt_length = prompt_length = past + length
        order = real = prompt_tokens = None
        mask = self._mask(given.get("attention_mask"), batch, past + length)
        if mask is not None and not bool(mask.all()):
            mask = mask.to(carrier.device)
            chunk, count = mask[:, past : past + length], mask.long().cumsum(dim=1)
            order = torch.where(chunk, count[:, past : past + length] - 1, -1)
            prompt_tokens = mask[:, :prompt_length].sum(dim=1)
            real = None if bool(chunk.all()) else chunk
        device = carrier.device
        roles = self._chunk_of_roles(batch, past, length, device)
        self._now = TokenContext(batch, past, length, order, real, prompt_length, prompt_tokens, ids, device, roles)

    def _chunk_of_roles(self, batch: int, past: int, length: int, device: torch.device) -> Tensor | None:
        if self._roles is None:
            return None
        given = self._roles.to(device)
        written = given.new_full((batch, max(past + length - given.shape[1], 0)), MESSAGES["answer"])
        return torch.cat([given, written], dim=1)[:, past : past + length]

    def _mask(self, given: Any, batch: int, columns: int) -> Tensor | None:
        """Which columns hold real tokens ``[batch, columns]``; None where nothing says so.

        With a static cache generate() hands the model masks of attention, ``[batch, 1, length, columns]``, and several
        of them where some layers see a window; what it was given itself is then the better source.
        """
        flat = _flat_mask(given)
        if flat is None and self._prompt_mask is not None:
            prompt = self._prompt_mask
            prompt = prompt.repeat_interleave(max(batch // len(prompt), 1), dim=0)  # beams, several answers
            flat = torch.cat([prompt, prompt.new_ones(batch, max(columns - prompt.shape[1], 0))], dim=1)
        if flat is None:
            given = (given.get("full_attention") or None) if isinstance(given, dict) else given
            if not isinstance(given, Tensor) or given.ndim != 4:
                return None
            last = given[:, 0, -1]  # a text's last token sees all others
            flat = last if last.dtype == torch.bool else last == 0
        return flat[:, :columns]


def _flat_mask(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _past_length(cache: Any) -> int:
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise UserError(
            f"steering cannot tell how many tokens a {type(cache).__name__} holds; use a transformers Cache"
        )
    return int(cache.get_seq_length())


def _given_length(args: tuple, kwargs: dict[str, Any]) -> int | None:
    candidates = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "input", "inputs_embeds"))]
    return next((c.shape[1] for c in candidates if isinstance(c, Tensor) and c.ndim >= 2), None)

"""What the model writes under several kinds of steering, beside controls, token by token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from saelab.lm.tokens import decode_each, end_ids, tokenizer_of
from saelab.lm.tokens import token_ids as plain_ids
from saelab.steering import (
    Calibration,
    Intervention,
    Sampling,
    TextDamage,
    attach,
    encode_chat,
    measure_text,
)
from saelab.steering.chat import Message, turn_ends
from saelab.steering.generation import token_steps
from saelab.steering.measure.control import with_damage_of
from saelab.steering.measure.passages import Passage

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Beginning:
    """A prompt, or a chat up to the answer, as the model reads it."""

    ids: list[int]
    roles: list[int] | None  # of a chat
    ends: tuple[int, ...]  # tokens that end what follows

    @classmethod
    def of_text(cls, model: nn.Module, prompt: str) -> Beginning:
        """A text to continue."""
        tokenizer = tokenizer_of(model)
        return cls(plain_ids(tokenizer, prompt), None, end_ids(model, tokenizer))

    @classmethod
    def of_chat(cls, model: nn.Module, messages: Sequence[Message]) -> Beginning:
        """A chat to answer."""
        tokenizer = tokenizer_of(model)
        found = encode_chat(tokenizer, messages)
        return cls(found.ids, found.roles, turn_ends(model, tokenizer))


@dataclass
class Text:
    """One text of a trial, as far as it is written."""

    name: str
    why: str  # how it was made
    interventions: list[Intervention] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    strings: list[str] = field(default_factory=list)  # of each token, once it is finished
    damage: TextDamage | None = None
    stopped: bool = True  # before it was finished
    note: str = ""  # what is to be said beside its damage

    def match(self, model: nn.Module, steered: Sequence[Intervention], passage: Passage) -> None:
        """Have a control, which is not written yet, do the damage that ``steered`` does to a passage."""
        found = with_damage_of(model, self.interventions, steered, passage)
        self.interventions, self.note = found.interventions, found.sentence

    def written(self, model: nn.Module, beginning: Beginning, **sampling: Any) -> Generator[None, None, None]:
        """Write it, a token a step; then measure its damage. Closed early, it keeps what it has."""
        ids = torch.tensor([beginning.ids])
        roles = None if beginning.roles is None else torch.tensor([beginning.roles])
        with attach(model, self.interventions) as positions, positions.generating(ids.shape[1], roles):
            for step in token_steps(model, ids, torch.ones_like(ids), Sampling(**sampling), beginning.ends):
                self.tokens.append(int(step[0]))
                yield
        self.finish(model, beginning)
        self.stopped = False

    def finish(self, model: nn.Module, beginning: Beginning) -> None:
        """Tell the tokens apart, and measure the damage."""
        self.strings = decode_each(tokenizer_of(model), self.tokens)
        if self.tokens:
            self.damage = measure_text(model, beginning.ids, self.tokens, self.interventions, beginning.roles)


def budget_name(found: Calibration) -> str:
    """A calibrated strength by its damage: ``KL 0.3``; by what it reached where that is less."""
    return f"KL {found.budget:g}" if found.reached else f"KL {found.damage:.2g} (largest tried)"

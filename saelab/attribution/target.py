"""What is explained: a logit, a difference of logits or a log-probability of the token after the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.lm.tokens import token_ids, token_text

Of = Literal["logit", "logprob"]


@dataclass(frozen=True)
class Target:
    """A number of the model's prediction after the prompt.

    ``logit`` is relative to the mean over the vocabulary, which softmax does not see. With ``against`` it is the
    difference of two logits, which is also that of the two log-probabilities.
    """

    token: int
    text: str
    against: int | None = None
    against_text: str = ""
    of: Of = "logit"

    @property
    def name(self) -> str:
        """What the number is, in words."""
        if self.against is not None:
            return f"logit of {self.text!r} minus logit of {self.against_text!r}"
        return f"{'logit' if self.of == 'logit' else 'log-probability'} of {self.text!r}"

    @property
    def is_linear(self) -> bool:
        """Whether the number is linear in the logits."""
        return self.of == "logit" or self.against is not None

    def value(self, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
        """The number for each row; differentiable, in float32 at least."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.against is not None:
            return logits[:, self.token] - logits[:, self.against]
        if self.of == "logprob":
            return logits.log_softmax(dim=-1)[:, self.token]
        return logits[:, self.token] - logits.mean(dim=-1)


def find_target(
    tokenizer: Any,
    prompt: str,
    ids: list[int],
    logits: Float[Tensor, " vocabulary"],
    target: str | int | None,
    against: str | int | None,
    of: Of,
) -> tuple[Target, list[str]]:
    """The target that a user names, by default the likeliest token; and what they should know of it.

    ``ids`` are the prompt's tokens and ``logits`` the model's prediction after them.
    """
    if of not in ("logit", "logprob"):
        raise UserError(f"of={of!r} is neither logit nor logprob")
    notes: list[str] = []

    def find(given: str | int, what: str) -> int:
        number, note = _token(tokenizer, prompt, ids, given, what)
        if not 0 <= number < logits.numel():
            raise UserError(f"{what}={given!r} is outside the vocabulary of {logits.numel()} tokens")
        notes.extend([note] if note else [])
        return number

    token = int(logits.argmax()) if target is None else find(target, "target")
    other = None if against is None else find(against, "against")
    if other == token:
        raise UserError(f"target and against are the same token, {token_text(tokenizer, token)!r}; name two")
    against_text = "" if other is None else token_text(tokenizer, other)
    return Target(token, token_text(tokenizer, token), other, against_text, of), notes


def _token(tokenizer: Any, prompt: str, ids: list[int], given: str | int, what: str) -> tuple[int, str]:
    """The token that ``given`` begins with where it stands after the prompt, and a remark if it has more than one."""
    if isinstance(given, int):
        return given, ""
    if not given:
        raise UserError(f"{what} is empty; give a text such as ' Paris', or leave it out")
    # In its place: SentencePiece gives a text alone a space that it does not have behind another.
    behind = token_ids(tokenizer, prompt + given)
    found = behind[len(ids) :] if behind[: len(ids)] == ids else token_ids(tokenizer, given, bos=False)
    if not found:
        raise UserError(f"{what}={given!r} gives no token; give a text such as ' Paris'")
    if len(found) == 1:
        return found[0], ""
    first = token_text(tokenizer, found[0])
    return found[0], f"{what} {given!r} is {len(found)} tokens; the first, {first!r}, is explained"

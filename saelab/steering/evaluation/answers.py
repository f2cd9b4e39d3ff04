"""The answers that an evaluation judges: planned, generated in batches of differently steered rows, and kept.

A row of a batch is one instruction under one method at one strength; see :mod:`saelab.steering.rows`. Answers go to
``answers.jsonl``, a batch at a time, so that an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from saelab.errors import UserError
from saelab.lm.tokens import end_ids, padded, token_ids, written_text
from saelab.steering.chat import encode_chat, turn_ends
from saelab.steering.generation import generate_tokens
from saelab.steering.interventions import Intervention
from saelab.steering.rows import on_rows


@dataclass(frozen=True)
class Row:
    """One answer to be: which instruction, steered how."""

    concept: str  # "" for the unsteered model, whose answers serve every concept
    method: str
    level: int  # which of the method's strengths
    seed: int
    instruction: int  # its place in the list
    split: str  # "choose": the strength is chosen on it, or "test"

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        return self.concept, self.method, self.level, self.seed, self.instruction


@dataclass
class Answer:
    """A row and what was written and measured."""

    row: Row
    text: str
    tokens: list[int]
    strength: float | None  # in units of the activations, or the factor of a recipe; None for words and for nothing
    proxies: dict[str, float] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """As JSON."""
        own = {"text": self.text, "tokens": self.tokens, "strength": self.strength, "proxies": self.proxies}
        return asdict(self.row) | own

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Answer:
        """From a line of ``answers.jsonl``."""
        rest = {name: content[name] for name in ("text", "tokens", "strength", "proxies")}
        return cls(Row(**{name: content[name] for name in Row.__annotations__}), **rest)


@dataclass(frozen=True)
class Generation:
    """How answers are written."""

    max_new_tokens: int = 40
    """Tokens of an answer."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    batch: int = 48
    """Answers that are generated together."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be 0 or more")


def prompt_ids(tokenizer: Any, instruction: str, system: str = "") -> list[int]:
    """An instruction in the model's chat template, or as plain text where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return token_ids(tokenizer, "\n".join(filter(None, [system, instruction, ""])))
    opening = [{"role": "system", "content": system}] if system else []
    return encode_chat(tokenizer, [*opening, {"role": "user", "content": instruction}]).ids


def answer_ends(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer."""
    return turn_ends(model, tokenizer) if getattr(tokenizer, "chat_template", None) else end_ids(model, tokenizer)


@dataclass(frozen=True)
class Steered:
    """What is done to one row."""

    system: str = ""
    interventions: Sequence[Intervention] = ()
    strength: float | None = None


def generate_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[tuple[Row, Steered]],
    instructions: Sequence[str],
    settings: Generation,
    seed: int,
) -> list[Answer]:
    """The answers of one batch, each as if it was generated alone (at temperature 0; else the draws differ)."""
    ids, mask = padded([prompt_ids(tokenizer, instructions[r.instruction], steered.system) for r, steered in rows])
    groups: dict[int, tuple[Sequence[Intervention], list[int]]] = {}
    for place, (_, steered) in enumerate(rows):
        if steered.interventions:
            groups.setdefault(id(steered), (steered.interventions, []))[1].append(place)
    own = [i for interventions, places in groups.values() for i in on_rows(interventions, places)]
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature}
    written = generate_tokens(model, ids, mask, own, eos=answer_ends(model, tokenizer), seed=seed, **options)
    return [
        Answer(row, written_text(tokenizer, tokens), tokens, steered.strength)
        for (row, steered), tokens in zip(rows, written)
    ]


def batches(
    rows: Sequence[tuple[Row, Steered]], lengths: Sequence[int], size: int
) -> Iterator[list[tuple[Row, Steered]]]:
    """Rows in groups of at most ``size``, those of similar prompt length together, so that little is padding.

    The groups depend on the rows alone, so that an evaluation that goes on later makes the same ones.
    """
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    for start in range(0, len(rows), size):
        yield [rows[i] for i in order[start : start + size]]


class Kept:
    """The answers in a file; the last line may be cut off, as after a crash."""

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, dict[tuple, Answer]()
        raw = path.read_bytes() if path.is_file() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                answer = Answer.from_content(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} is damaged in line {number}; remove that line, or start with --overwrite"
                ) from error
            self.answers[answer.row.key] = answer
        if len(whole) < len(raw):
            path.write_bytes(whole)

    def add(self, answers: Sequence[Answer]) -> None:
        """Append a batch in one write."""
        text = "".join(json.dumps(answer.content()) + "\n" for answer in answers)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.answers |= {answer.row.key: answer for answer in answers}

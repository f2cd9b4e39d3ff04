"""The steering bench: what is picked, the interventions it means, and their controls."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from saelab.errors import UserError
from saelab.runs import Run
from saelab.steering import (
    Ablate,
    Add,
    Clamp,
    Intervention,
    MinClamp,
    ProjectOut,
    Scale,
    SteeringVector,
    generate_tokens,
)
from saelab.steering.directions import random_direction
from saelab.steering.generation import tokenize, tokenizer_of

if TYPE_CHECKING:
    from torch import nn

# operation -> (what its number means, default, largest, step); None: it takes no number
OPERATIONS: dict[str, tuple[str, float, float, float] | None] = {
    "add": ("strength", 1.0, 4.0, 0.05),
    "clamp": ("activation", 1.0, 4.0, 0.05),
    "at least": ("activation", 1.0, 4.0, 0.05),
    "scale": ("factor", 2.0, 8.0, 0.1),
    "ablate": None,
    "project out": None,
}
UNITS = {"max": "× max activation", "norm": "× activation norm", "raw": "× own length"}


@dataclass(frozen=True)
class Pick:
    """One line of the bench: a latent's pole, or a vector made from texts, and what to do with it."""

    label: str
    latent: int | None = None
    pole: int = 1
    vector: SteeringVector | None = None
    operation: str = "add"
    amount: float = 1.0
    unit: str = "raw"
    start: float | None = None
    """The amount it came with, where it came from a saved recipe."""

    def changed(self, **fields: Any) -> Pick:
        return replace(self, **fields)


def pick_latent(source: Run, latent: int, pole: int) -> Pick:
    """A latent with the best unit that is known for it."""
    vector = SteeringVector.from_latent(source, latent, pole)
    sign = "" if pole > 0 else " −"
    return Pick(f"#{latent}{sign}", latent, pole, vector, unit=best_unit(vector))


def pick_vector(vector: SteeringVector, label: str) -> Pick:
    """A vector made from texts; one own length is its natural strength."""
    return Pick(label, vector=vector, unit="raw")


def best_unit(vector: SteeringVector) -> str:
    """The most telling unit a vector knows."""
    if vector.max_activation:
        return "max"
    return "norm" if vector.rms_norm else "raw"


def units(pick: Pick) -> list[str]:
    """Units in which this pick's amount can be given."""
    vector = pick.vector
    known = {"max": vector is not None and vector.max_activation, "norm": vector is not None and vector.rms_norm}
    return [unit for unit in UNITS if unit == "raw" or known[unit]]


def operations(pick: Pick) -> list[str]:
    """Operations on a latent's activation need a latent."""
    return list(OPERATIONS) if pick.latent is not None else ["add", "project out"]


def intervention(pick: Pick, source: Run) -> Intervention:
    """What a pick does to the model. Activations are given in multiples of the maximum where that is known."""
    assert pick.vector is not None
    if pick.operation == "add":
        return Add(pick.vector, f"{pick.amount}{pick.unit}")
    if pick.operation == "project out":
        return ProjectOut(pick.vector)
    if pick.latent is None:
        raise UserError(f"{pick.operation!r} needs a latent; a vector made from texts can be added or projected out")
    pole = pick.pole if source.sae.signed else 0
    if pick.operation == "ablate":
        return Ablate(source, pick.latent, pole=pole)
    if pick.operation == "scale":
        return Scale(source, pick.latent, pick.amount, pole=pole)
    value = pick.pole * pick.vector.length(f"{pick.amount}{pick.unit}") / pick.vector.norm
    kind = Clamp if pick.operation == "clamp" else MinClamp
    return kind(source, pick.latent, value, pole=pole)


def size(pick: Pick) -> str:
    """What the amount comes to, where a length is added: in raw units and beside the activations' norm."""
    if pick.operation != "add" or pick.vector is None:
        return ""
    length = pick.vector.length(f"{pick.amount}{pick.unit}")
    rms = pick.vector.rms_norm
    beside = f", {abs(length) / rms:.0%} of the activations' root mean square norm" if rms else ""
    return f"adds a vector of length {abs(length):.4g} in raw units{beside}"


def control(pick: Pick, seed: int) -> Intervention:
    """The same kind of change along a random direction: added at equal length, or projected out."""
    assert pick.vector is not None
    direction = random_direction(pick.vector, seed)
    if pick.operation in {"add", "clamp", "at least"}:
        return Add(direction, pick.vector.length(f"{pick.amount}{pick.unit}"))
    return ProjectOut(direction)


@dataclass(frozen=True)
class Continuation:
    """Generated tokens and how each reads."""

    tokens: list[int]
    strings: list[str]


def continue_text(
    model: nn.Module, prompt: str, interventions: Sequence[Intervention], **sampling: Any
) -> Continuation:
    """The model's continuation of ``prompt`` under ``interventions``."""
    from saelab.prompt.reading import decode_each

    tokenizer = tokenizer_of(model)
    ids, mask = tokenize(tokenizer, prompt)
    row = generate_tokens(model, ids, mask, list(interventions), eos=tokenizer.eos_token_id, **sampling)[0]
    return Continuation(row, decode_each(tokenizer, row))


def changed(before: Sequence[int], after: Sequence[int]) -> list[bool]:
    """Which tokens of ``after`` are not in the longest common subsequences with ``before``."""
    marks = [True] * len(after)
    matcher = difflib.SequenceMatcher(None, list(before), list(after), autojunk=False)
    for _, start, size in matcher.get_matching_blocks():
        marks[start : start + size] = [False] * size
    return marks

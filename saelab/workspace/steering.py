"""The Steering page without its widgets: the latents and vectors that were picked, and the interventions they mean."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from saelab.errors import UserError
from saelab.lm.tokens import end_ids, tokenize, tokenizer_of
from saelab.runs import Run
from saelab.steering import (
    OPERATIONS,
    Add,
    Calibration,
    Condition,
    Intervention,
    LatentFires,
    Schedule,
    SteeringVector,
    VectorIntervention,
    at_layers,
    generate_tokens,
)
from saelab.steering.layers import parse_layers
from saelab.steering.positions import Where
from saelab.steering.vectors import Strength

if TYPE_CHECKING:
    from torch import nn

PLACES = ("all", "prompt", "generated", "answer", "instruction")
UNITS = {"max": "× max activation", "norm": "× activation norm", "raw": "× own length"}


@dataclass(frozen=True)
class Pick:
    """A latent's pole, or a vector made from texts, and the operation to apply with it."""

    label: str
    vector: SteeringVector
    latent: int | None = None
    pole: int = 1
    operation: str = "add"
    amount: float = 1.0
    unit: str = "raw"
    start: float | None = None
    """The amount it came with, where it came from a saved recipe."""
    where: Where = "all"
    """The tokens it acts on."""
    skip_first: bool | None = None
    """Whether each text's first token is left alone; None for the default of the operation."""
    keep_error: bool | None = None
    """Whether the SAE's reconstruction error stays, for operations on a latent; None for the default."""
    when: Condition | None = None
    """What must hold on a token."""
    schedule: Schedule | None = None
    """The weights of generated tokens."""
    layers: str = ""
    """Blocks to act at, as ``saelab steer --layers`` takes them; empty for the vector's own."""
    note: str = ""
    """How its amount was found."""

    def changed(self, **fields: Any) -> Pick:
        """The pick with some of its fields replaced."""
        return replace(self, **fields)

    @property
    def strength(self) -> Strength | None:
        """The number for its operation; None where it takes none."""
        amount = OPERATIONS[self.operation].amount
        if amount is None:
            return None
        return f"{self.amount}{self.unit}" if amount.units else self.amount


def pick_latent(source: Run, latent: int, pole: int) -> Pick:
    """A latent with the best unit that is known for it."""
    vector = SteeringVector.from_latent(source, latent, pole)
    sign = "" if pole > 0 else " −"
    return Pick(f"#{latent}{sign}", vector, latent, pole, unit=best_unit(vector))


def pick_vector(vector: SteeringVector, label: str) -> Pick:
    """A vector made from texts; its natural strength is its own length."""
    return Pick(label, vector, unit="raw")


def same_vector(pick: Pick, other: Pick) -> bool:
    """Whether two picks are along the same vector, whatever is done with it: then they have the same doses."""
    return pick.vector.hook_name == other.vector.hook_name and torch.equal(
        pick.vector.direction * pick.vector.norm, other.vector.direction * other.vector.norm
    )


def described(picks: Sequence[Pick], prompt: str, options: Mapping[str, Any]) -> str:
    """One line on what a continuation was made with: interventions, prompt and sampling."""
    parts = [" ".join(filter(None, (p.operation, p.label, _amount(p), _place(p)))) for p in picks]
    sampling = [f"{name.replace('_', ' ')} {value}" for name, value in options.items()]
    return " · ".join([*parts, f"“{prompt.strip()}”", *sampling])


def _amount(pick: Pick) -> str:
    return (
        "" if pick.strength is None else f"{pick.strength}" if isinstance(pick.strength, str) else f"{pick.strength:g}"
    )


def _place(pick: Pick) -> str:
    where = "" if pick.where == "all" else f"on {pick.where}"
    when = "" if pick.when is None else f"where {condition_text(pick.when)}"
    schedule = "" if pick.schedule is None else f"schedule {schedule_text(pick.schedule)}"
    return " ".join(filter(None, (where, when, schedule, f"layers {pick.layers}" * bool(pick.layers))))


def best_unit(vector: SteeringVector) -> str:
    """The first of max, norm and raw that the vector knows."""
    if vector.max_activation:
        return "max"
    return "norm" if vector.rms_norm else "raw"


def units(pick: Pick) -> list[str]:
    """Units in which this pick's amount can be given."""
    known = {"max": pick.vector.max_activation, "norm": pick.vector.rms_norm}
    return [unit for unit in UNITS if unit == "raw" or known[unit]]


def operations(pick: Pick) -> list[str]:
    """The operations that are possible: those on a latent's activation need a latent."""
    return [name for name, cls in OPERATIONS.items() if pick.latent is not None or issubclass(cls, VectorIntervention)]


def intervention(pick: Pick, source: Run) -> Intervention:
    """What a pick does to the model."""
    operation = OPERATIONS[pick.operation]
    skip: dict[str, Any] = {"when": pick.when, "schedule": pick.schedule}
    skip |= {} if pick.skip_first is None else {"skip_first": pick.skip_first}
    if issubclass(operation, VectorIntervention):
        return replace(operation.on_vector(pick.vector, pick.strength, where=pick.where), **skip)
    if pick.latent is None:
        raise UserError(f"{pick.operation} needs a latent; for a vector made from texts choose another operation")
    error = {} if pick.keep_error is None else {"keep_error": pick.keep_error}
    step = operation.on_latent(source, pick.latent, pick.strength, pole=pick.pole, where=pick.where)
    return replace(step, **skip, **error)


def interventions(pick: Pick, source: Run, model: nn.Module) -> list[Intervention]:
    """What a pick does to the model, at each layer that it names."""
    step = intervention(pick, source)
    if not pick.layers:
        return [step]
    if not isinstance(step, VectorIntervention):
        raise UserError(f"{pick.operation} changes a latent, whose SAE has one layer; leave out the other layers")
    return [*at_layers(model, step, parse_layers(pick.layers))]


def condition_text(when: Condition) -> str:
    """``7>0.5`` or ``-7>0.5`` for a latent's pole, as an address has it; a probe by its threshold and place."""
    if isinstance(when, LatentFires):
        return f"{'-' * (when.pole < 0)}{when.latent}>{when.threshold:g}"
    settings = when.settings()
    return f"{settings['kind']}>{settings['above']:g} at {settings['hook_name']}"


def schedule_text(schedule: Schedule) -> str:
    """``0:1,20:0``, as :meth:`Schedule.parse` takes it."""
    return ",".join(f"{step:g}:{weight:g}" for step, weight in schedule.points)


def size(pick: Pick) -> str:
    """What the amount comes to, where a length is added: in raw units and beside the activations' norm."""
    if OPERATIONS[pick.operation] is not Add:
        return ""
    length = pick.vector.length(f"{pick.amount}{pick.unit}")
    rms = pick.vector.rms_norm
    beside = f", {abs(length) / rms:.0%} of the activations' root mean square norm" if rms else ""
    return f"adds a vector of length {abs(length):.4g} in raw units{beside}"


def calibrated(pick: Pick, found: Calibration) -> Pick:
    """The pick with the strength that was found, to three significant digits, in its unit."""
    amount = float(f"{found.strength / pick.vector.length(f'1{pick.unit}'):.3g}")
    reached = "" if found.reached else ", the largest strength that was tried"
    note = f"found by calibration: KL {found.damage:.2g} nats per token on neutral texts{reached}"
    return pick.changed(amount=amount, start=amount, note=note)


def limits(pick: Pick) -> list[str]:
    """Where the pick acts and what it leaves alone, where that is not the default and no widget shows it."""
    found = []
    if not isinstance(pick.where, str):
        found.append(f"acts on: {pick.where}")
    if pick.skip_first is not None:
        found.append(f"first token: {'left unchanged' if pick.skip_first else 'steered as well'}")
    if pick.keep_error is False:
        found.append("the SAE's reconstruction error is dropped")
    if pick.when is not None:
        settings = pick.when.settings()
        what = f"latent {settings['latent']}" if "latent" in settings else "a probe"
        found.append(f"only where {what} is above {settings['above']:.3g} at {settings['hook_name']}")
    if pick.layers:
        found.append(f"at blocks {pick.layers} instead of the SAE's own")
    if pick.schedule is not None:
        points = ", ".join(f"{weight:g} at {step:g}" for step, weight in pick.schedule.points)
        found.append(f"weight of generated tokens: {points}")
    return found


@dataclass(frozen=True)
class Continuation:
    """Generated tokens and how each reads."""

    tokens: list[int]
    strings: list[str]


def continue_text(
    model: nn.Module, prompt: str, interventions: Sequence[Intervention], **sampling: Any
) -> Continuation:
    """The model's continuation of ``prompt`` under ``interventions``."""
    from saelab.lm.tokens import decode_each

    tokenizer = tokenizer_of(model)
    ids, mask = tokenize(tokenizer, prompt)
    row = generate_tokens(model, ids, mask, list(interventions), eos=end_ids(model, tokenizer), **sampling)[0]
    return Continuation(row, decode_each(tokenizer, row))


def changed(before: Sequence[int], after: Sequence[int]) -> list[bool]:
    """Which tokens of ``after`` are not in the longest common subsequences with ``before``."""
    marks = [True] * len(after)
    matcher = difflib.SequenceMatcher(None, list(before), list(after), autojunk=False)
    for _, start, size in matcher.get_matching_blocks():
        marks[start : start + size] = [False] * size
    return marks

"""Calibration: the largest strength whose damage to a model's predictions stays within a budget, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from saelab.errors import UserError
from saelab.lm.tokens import Prompts
from saelab.steering.directions import read_texts, rms
from saelab.steering.interventions import Intervention
from saelab.steering.measure.budget import check_budget, damage_in
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.operations import Add
from saelab.steering.vectors import SteeringVector

SMALLEST = 2.0**-20  # of the limit: a strength this small does nothing


@dataclass(frozen=True)
class Calibration:
    """The outcome of :func:`calibrate`; ``trace`` lists every (strength, damage) that was measured."""

    strength: float  # absolute, in units of the activations; of ``make``'s argument where one was given
    damage: float  # measured at that strength, at most the budget
    budget: float
    unit: str  # "kl" in nats per token, or "perplexity" as a ratio
    reached: bool  # False: even the largest strength tried costs less than the budget
    trace: list[tuple[float, float]] = field(default_factory=list)


def calibrate(
    model: nn.Module,
    vector: SteeringVector | Callable[[float], Intervention | Sequence[Intervention]],
    prompts: Prompts,
    *,
    budget_kl: float | None = None,
    budget_perplexity: float | None = None,
    limit: float | None = None,
    tolerance: float = 0.02,
    tokenizer: Any = None,
) -> Calibration:
    """The largest strength found whose damage on ``prompts`` stays within the budget.

    ``budget_kl`` is the mean KL(unsteered || steered) per token in nats, ``budget_perplexity`` the ratio of
    perplexities (1.1: ten per cent worse), the geometric mean over prompts. The strength doubles from ``limit / 128``
    until it exceeds the budget, then the bracket is halved until it is narrower than ``tolerance`` of itself. Where
    damage does not grow steadily with strength this finds the first crossing. ``limit`` defaults to four times the
    root-mean-square norm of the activations. UserError where damage stays above the budget however small the strength.
    ``vector`` may be a function from a strength to any intervention or several; then ``limit`` is needed.
    """
    if (budget_kl is None) == (budget_perplexity is None):
        raise UserError("give one budget: budget_kl in nats per token, or budget_perplexity as a ratio above 1")
    unit = "kl" if budget_kl is not None else "perplexity"
    budget = budget_kl if budget_kl is not None else budget_perplexity
    assert budget is not None
    return _calibrate(model, vector, prompts, [budget], unit, limit, tolerance, tokenizer)[0]


def calibrate_each(
    model: nn.Module,
    vector: SteeringVector | Callable[[float], Intervention | Sequence[Intervention]],
    prompts: Prompts,
    budgets_kl: Sequence[float] = (0.1, 0.3, 1.0),
    *,
    limit: float | None = None,
    tolerance: float = 0.05,
    tokenizer: Any = None,
) -> list[Calibration]:
    """:func:`calibrate` for several budgets of KL, which share the measurements of the doubling strengths."""
    return _calibrate(model, vector, prompts, budgets_kl, "kl", limit, tolerance, tokenizer)


def _calibrate(
    model: nn.Module,
    vector: SteeringVector | Callable[[float], Intervention | Sequence[Intervention]],
    prompts: Prompts,
    budgets: Sequence[float],
    unit: str,
    limit: float | None,
    tolerance: float,
    tokenizer: Any,
) -> list[Calibration]:
    for budget in budgets:
        check_budget(budget, unit)
    baseline = UnsteeredBaseline(model, prompts, tokenizer=tokenizer)
    if isinstance(vector, SteeringVector):
        limit = limit or 4 * (
            vector.rms_norm or activation_norm(model, vector.hook_name, baseline.prompts, tokenizer=baseline.tokenizer)
        )
    elif limit is None:
        raise UserError("calibrating a function of strength needs limit, the largest strength to try")
    known: dict[float, float] = {}

    def damage(strength: float) -> float:
        if strength not in known:
            intervention = Add(vector, strength) if isinstance(vector, SteeringVector) else vector(strength)
            known[strength] = damage_in(baseline.measure(intervention), unit)
        return known[strength]

    return [find_strength(damage, budget, unit, limit, tolerance) for budget in budgets]


def find_strength(
    damage: Callable[[float], float], budget: float, unit: str, limit: float, tolerance: float
) -> Calibration:
    """The largest strength found at which ``damage`` stays within the budget; see :func:`calibrate`.

    UserError where even ``limit`` changes nothing at all: then the interventions act on no token of the texts, and the
    strength that is found would mean nothing.
    """
    check_budget(budget, unit)
    floor = 0.0 if unit == "kl" else 1.0
    trace: list[tuple[float, float]] = []

    def traced(strength: float) -> float:
        trace.append((strength, damage(strength)))
        return trace[-1][1]

    strength, found, reached = _largest(traced, budget, floor, limit, tolerance)
    if not reached and all(measured == floor for _, measured in trace):
        raise UserError(
            f"strengths up to {limit:.3g} change nothing on the texts of the calibration, so no token of theirs is one "
            "to be steered; give texts with such tokens, or a strength"
        )
    return Calibration(strength, found, budget, unit, reached, trace)


def _largest(
    damage: Callable[[float], float], budget: float, floor: float, limit: float, tolerance: float
) -> tuple[float, float, bool]:
    """The largest strength found within the budget, its damage, and whether a larger one is beyond the budget.

    What is not a number, as after an overflow, is no damage within the budget.
    """
    low, low_damage, high = 0.0, floor, limit / 128
    while (found := damage(high)) <= budget:
        low, low_damage = high, found
        if high >= limit:
            return low, low_damage, False
        high = min(2 * high, limit)
    while high - low > tolerance * high:
        middle = (low + high) / 2
        if (found := damage(middle)) <= budget:
            low, low_damage = middle, found
        else:
            high = middle
        if low == 0 and high < limit * SMALLEST:
            raise UserError(
                f"the damage is {found:.3g} even at strength {high:.3g}, above the budget {budget:g}; give a larger "
                "budget, or an operation that does nothing at strength 0"
            )
    return low, low_damage, True


def activation_norm(model: nn.Module, hook_name: str, prompts: Prompts, *, tokenizer: Any = None) -> float:
    """Root mean square norm of the activations at a hook point, over the tokens of ``prompts`` but each first one.

    It is the unit that a run records of the cache it was trained on.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return rms(read_texts(model, hook_name, texts, tokenizer=tokenizer)[1])

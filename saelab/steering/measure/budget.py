"""Strengths of many directions at one damage, a few passes of the model for all of them together.

:func:`saelab.steering.measure.calibration.calibrate` finds the largest strength within a budget for one direction, by
bisection from below. Here many are measured in one batch, and damage is taken to grow as a power of the strength
between two measurements, which three to six of them settle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saelab.errors import UserError
from saelab.steering.interventions import Intervention
from saelab.steering.measure.effects import Effects, UnsteeredBaseline

Maker = Callable[[float], Sequence[Intervention]]
GROWTH = 3.0  # at most, from one strength to the next, so that a damage that falls again further out is not found


@dataclass(frozen=True)
class AtBudget:
    """A strength and the damage measured there."""

    strength: float
    damage: float  # nats of KL per token, or a ratio of perplexities
    reached: bool  # within the tolerance; False where even ``limit`` costs less, or where no strength does
    effects: Effects


def damage_in(effects: Effects, unit: str) -> float:
    """The damage in the unit of a budget, ``"kl"`` or ``"perplexity"``; infinite where it is not a number."""
    try:
        found = effects.mean_kl if unit == "kl" else effects.perplexity_ratio
    except OverflowError:
        return math.inf
    return found if math.isfinite(found) else math.inf


def check_budget(budget: float, unit: str) -> None:
    """Refuse a budget that no steering can keep or that has no limit."""
    if unit not in ("kl", "perplexity"):
        raise UserError(f"the budget's unit {unit!r} is neither kl nor perplexity")
    floor = 0.0 if unit == "kl" else 1.0
    if not floor < budget < math.inf:
        raise UserError(f"the budget {budget} is not a finite number above {floor:g}, the damage of doing nothing")


def strengths_at(
    baseline: UnsteeredBaseline,
    makers: Sequence[Maker],
    budget: float,
    start: float,
    *,
    unit: str = "kl",
    tolerance: float = 0.05,
    limit: float = math.inf,
    rounds: int = 12,
) -> list[AtBudget]:
    """For each function from a strength to interventions, the strength at which the damage is ``budget``.

    The search begins at ``start`` and ends within ``tolerance`` of the budget (relative to it, or for perplexity to
    what it exceeds 1 by), or at ``limit``, or after ``rounds`` measurements; then the closest one below the budget is
    given, and otherwise the closest one.
    """
    check_budget(budget, unit)
    floor = 0.0 if unit == "kl" else 1.0
    goal = budget - floor
    searches = [_Search(start, goal, limit) for _ in makers]
    results: list[AtBudget | None] = [None] * len(makers)
    for _ in range(rounds):
        open_ones = [i for i, search in enumerate(searches) if not search.done]
        if not open_ones:
            break
        measured = baseline.measure_many([makers[i](searches[i].strength) for i in open_ones])
        for i, effects in zip(open_ones, measured):
            search, damage = searches[i], damage_in(effects, unit)
            if search.better(damage - floor):
                reached = abs(damage - floor - goal) <= tolerance * goal
                results[i] = AtBudget(search.strength, damage, reached, effects)
            search.step(damage - floor, tolerance)
    return [result for result in results if result is not None]


def strength_at(
    damage: Callable[[float], float],
    goal: float,
    start: float,
    *,
    tolerance: float = 0.05,
    limit: float = math.inf,
    rounds: int = 12,
) -> tuple[float, float, bool]:
    """The strength at which one ``damage`` is ``goal``, what it is there, and whether that is within the tolerance."""
    search, best = _Search(start, goal, limit), (start, 0.0, False)
    for _ in range(rounds):
        strength = search.strength
        found = damage(strength)
        found = found if math.isfinite(found) else math.inf
        if search.better(found):
            best = strength, found, abs(found - goal) <= tolerance * goal
        search.step(found, tolerance)
        if search.done:
            break
    return best


class _Search:
    """The search for one strength: secants on a log-log scale inside a bracket."""

    def __init__(self, start: float, goal: float, limit: float) -> None:
        self.strength, self.goal, self.limit = min(start, limit), goal, limit
        self.low, self.high = (0.0, 0.0), (math.inf, math.inf)  # (strength, damage)
        self.best = math.inf
        self.done = False

    def better(self, damage: float) -> bool:
        """Whether this is the closest to the goal so far, on a log scale; anything too small counts alike."""
        distance = abs(math.log(max(damage, 1e-9) / self.goal)) if damage < math.inf else math.inf
        if distance < self.best or self.best == math.inf:
            self.best = distance
            return True
        return False

    def step(self, damage: float, tolerance: float) -> None:
        """Choose the next strength, or end."""
        s, goal = self.strength, self.goal
        if abs(damage - goal) <= tolerance * goal or (damage < goal and s >= self.limit):
            self.done = True
            return
        if damage < goal:
            self.low = max(self.low, (s, damage))
        else:
            self.high = min(self.high, (s, damage))
        (low, at_low), (high, at_high) = self.low, self.high
        if high == math.inf:
            power = 2.0
            wanted = s * (goal / max(damage, 1e-9)) ** (1 / power)
            self.strength = min(max(wanted, 1.05 * s), GROWTH * s, self.limit)
        elif low > 0 and at_low <= 0:  # a perplexity that falls at first
            self.strength = math.sqrt(low * high)
        elif low == 0:
            self.strength = max(high * max(goal / at_high, 0.01) ** 0.5, low + 0.1 * (high - low))
            self.done = self.strength < 1e-9 * high
        elif not at_high < math.inf:
            self.strength = (low + high) / 2
        else:
            power = max(math.log(at_high / at_low) / math.log(high / low), 0.2)
            wanted = low * (goal / at_low) ** (1 / power)
            margin = 0.05 * (high - low)
            self.strength = min(max(wanted, low + margin), high - margin)

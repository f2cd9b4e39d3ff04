"""A control that does the damage of what it controls for."""

from __future__ import annotations

import math

import pytest
import torch

from saelab.steering import Add, ProjectOut
from saelab.steering.directions import random_direction
from saelab.steering.measure.budget import strength_at
from saelab.steering.measure.control import with_damage_of
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.texts import measure_text
from saelab.steering.vectors import SteeringVector
from tests.steering.models import D_MODEL, HOOK, llama
from tests.steering.test_steering import vector

TEXT = Passage([1, 5, 6, 70], [8, 9, 10, 44, 31])


def kl(*steps) -> float:
    return measure_text(llama(), TEXT.beginning, TEXT.written, list(steps)).kl


@pytest.mark.parametrize("length", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("where", ["all", "generated"])
def test_damages_are_alike_and_lengths_are_not(length: float, where: str) -> None:
    steered = Add(vector(), length, where=where)
    control = Add(random_direction(vector(), 1), length, where=where)
    found = with_damage_of(llama(), [control], [steered], TEXT)
    assert found.reached and found.goal == pytest.approx(kl(steered))
    assert kl(*found.interventions) == pytest.approx(found.damage) == pytest.approx(found.goal, rel=0.05)
    assert kl(control.times(found.factor)) == pytest.approx(found.damage)
    assert abs(kl(control) - found.goal) > 0.05 * found.goal or found.factor == 1.0


def test_nothing_to_be_equal_to_and_what_cannot_be_reached_are_told() -> None:
    control = Add(random_direction(vector(), 1), 2.0)
    found = with_damage_of(llama(), [control], [Add(vector(), 0.0)], TEXT)
    assert not found.reached and found.factor == 1.0 and found.interventions == [control] and found.damage > 0
    # What acts on no token of the text does nothing, however often.
    idle = ProjectOut(SteeringVector.from_tensor(torch.full((D_MODEL,), 1.0), HOOK), where=[60])
    found = with_damage_of(llama(), [idle], [Add(vector(), 4.0)], TEXT)
    assert not found.reached and found.damage == 0.0 and found.goal > 0


def test_a_strength_is_found_on_curves_that_are_not_powers() -> None:
    for damage in (lambda s: s**2, lambda s: math.expm1(s), lambda s: 5 * s / (1 + s), lambda s: s**0.5):
        strength, found, reached = strength_at(damage, 0.7, 1.0)
        assert reached and damage(strength) == found == pytest.approx(0.7, rel=0.05)
    strength, found, reached = strength_at(lambda s: min(s, 0.5), 0.7, 1.0, limit=64.0)
    assert not reached and found == 0.5
    # Beyond what the numbers hold, damage is infinite.
    strength, found, reached = strength_at(lambda s: s if s < 2 else math.nan, 1.9, 64.0)
    assert reached and found < 2

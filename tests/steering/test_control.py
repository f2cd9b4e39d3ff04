"""A control that does the damage of what it controls for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from saelab.steering import Ablate, Add, Clamp, LatentFires, ProjectOut, Schedule
from saelab.steering.directions import random_direction
from saelab.steering.measure.budget import strength_at
from saelab.steering.measure.control import random_controls, with_damage_of
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.texts import measure_text
from saelab.steering.vectors import SteeringVector
from tests.steering.models import D_MODEL, HOOK, llama
from tests.steering.test_steering import RUN, vector

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


def test_random_controls_keep_all_but_the_direction() -> None:
    schedule, other = Schedule([(0, 1), (4, 0)]), SteeringVector.from_latent(RUN, 5)
    steps = [
        Add(vector(), 3.0, where="generated", schedule=schedule),
        Add(replace(vector(), hook_name="blocks.0.hook_resid_post"), 3.0),
        ProjectOut(other),
        Clamp(RUN, 5, 2.0, pole=-1),
        Ablate(RUN, 7, when=LatentFires(RUN, 3)),
    ]
    controls = random_controls(steps, seed=4)
    assert [type(control) for control in controls] == [Add, Add, ProjectOut, Add, ProjectOut]
    for step, control in zip(steps, controls):
        for name in ("where", "skip_first", "hook_name", "when", "schedule"):
            assert getattr(control, name) is getattr(step, name) or getattr(control, name) == getattr(step, name), name
    directions = [control.directions[0].direction for control in controls]
    assert torch.equal(directions[0], directions[1]), "one direction at two layers has one control"
    apart = torch.stack([directions[0], *directions[2:]])
    assert (apart @ apart.T - torch.eye(4)).abs().max() < 0.99
    assert controls[0].length == 3.0 and controls[2].directions[0].norm == pytest.approx(other.norm)
    # A clamp adds the length that the latent's activation is set to.
    assert abs(controls[3].length) == pytest.approx(2.0 * float(RUN.sae.W_dec[5].detach().norm()))


def test_a_strength_is_found_on_curves_that_are_not_powers() -> None:
    for damage in (lambda s: s**2, lambda s: math.expm1(s), lambda s: 5 * s / (1 + s), lambda s: s**0.5):
        strength, found, reached = strength_at(damage, 0.7, 1.0)
        assert reached and damage(strength) == found == pytest.approx(0.7, rel=0.05)
    strength, found, reached = strength_at(lambda s: min(s, 0.5), 0.7, 1.0, limit=64.0)
    assert not reached and found == 0.5
    # Beyond what the numbers hold, damage is infinite.
    strength, found, reached = strength_at(lambda s: s if s < 2 else math.nan, 1.9, 64.0)
    assert reached and found < 2

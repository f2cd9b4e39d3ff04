"""Edges of a graph: the direct effect of every node on the kept latents and error terms, by vector-Jacobian products.

The text runs as several copies at once, so that each backward pass differentiates as many nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.attribution.passes import Pass, Passes, Reading, batches
from saelab.attribution.target import Target
from saelab.lm.gradients import gradients_of

COPIES = 8


@dataclass(frozen=True)
class Goal:
    """A node whose causes are asked for: a latent of place number ``place``, or the error term (``latent`` None)."""

    id: str
    place: int
    position: int
    latent: int | None


@dataclass
class Causes:
    """Gradients of one goal at the points before it, one entry per earlier place, then the embedding and the MLPs."""

    goal: Goal
    gradients: list[Tensor | None]  # each [length, d], None where it has no part


@torch.enable_grad()
def trace(
    passes: Passes, target: Target, goals: Sequence[Goal], slopes: Sequence[Tensor | None]
) -> tuple[Pass, list[Causes], list[str]]:
    """The cut pass, the causes of each goal, and the goals that could not be traced.

    ``slopes[p] [length, d_out]`` is the total gradient of the target at place ``p``; it gives the direction in which an
    error term matters. An encoder that selects otherwise in a copy of the text, by rounding, leaves a goal out.
    """
    copies = min(COPIES, max(1, len(goals)))
    passed = passes.run(target, cut=True, rows=copies)
    causes: list[Causes] = []
    lost: list[str] = []
    for place in range(len(passed.readings)):
        own = [goal for goal in goals if goal.place == place]
        for part in batches(len(own), copies):
            found, missing = _batch(passed, place, [own[i] for i in part], slopes[place])
            causes += found
            lost += missing
    return passed, causes, lost


def _batch(passed: Pass, place: int, goals: Sequence[Goal], slope: Tensor | None) -> tuple[list[Causes], list[str]]:
    reading = passed.readings[place]
    seeds, error_seeds, lost = torch.zeros_like(reading.code.values), torch.zeros_like(reading.error), []
    for row, goal in enumerate(goals):
        if goal.latent is None:
            if slope is not None:
                error_seeds[row, goal.position] = slope[goal.position].to(error_seeds)
            continue
        entry = _entry(reading, row, goal)
        if entry is None:
            lost.append(goal.id)
        else:
            seeds[entry] = 1.0
    before = [*passed.points[:place], *passed.points[len(passed.readings) :]]
    outputs = [(x, s) for x, s in ((reading.code.values, seeds), (reading.error, error_seeds)) if _wanted(x, s)]
    if not outputs:
        return [], lost
    found = gradients_of([x for x, _ in outputs], before, [s for _, s in outputs], retain_graph=True)
    # Places behind the goal have no part in it.
    behind = [None] * (len(passed.readings) - place)
    kept = [(row, goal) for row, goal in enumerate(goals) if goal.id not in lost]
    return [Causes(goal, [*_rows(found[:place], row), *behind, *_rows(found[place:], row)]) for row, goal in kept], lost


def _wanted(x: Tensor, seed: Tensor) -> bool:
    return x.requires_grad and bool((seed != 0).any())


def _rows(found: Sequence[Tensor | None], row: int) -> list[Tensor | None]:
    return [None if g is None else g[row] for g in found]


def _entry(reading: Reading, row: int, goal: Goal) -> int | None:
    """Where the goal's latent is in the code of one copy of the text; None where it is not active there."""
    token = row * reading.tokens + goal.position - reading.skip
    start, stop = int(reading.code.row_ptr[token]), int(reading.code.row_ptr[token + 1])
    hit = (reading.code.indices[start:stop] == goal.latent).nonzero()
    return start + int(hit[0]) if hit.numel() else None

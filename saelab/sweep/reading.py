"""One reading of a cache, in which several SAEs train on the same batches."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import torch

from saelab.data.cache import Batch
from saelab.sae import VARIANTS
from saelab.sweep.member import TIMES, Member
from saelab.sweep.part import Part
from saelab.training import Diverged, batches, centre_of, fit_steps


class Lost(Exception):
    """Another process has taken over an SAE: it must not be written here any more."""


def read_together(
    part: Part, active: Sequence[Member], until: int, resume: bool, often: dict[str, Any], device: torch.device
) -> Generator[None]:
    """Train members whose claims this process holds, from the step of the slowest to step ``until``; a batch each time.

    Those that have more steps to go are saved as checkpoints at the end, as all are if the generator is closed.
    """
    shared, claims = part.grid.entries[0].train, part.record.claims
    centre = centre_of(part.cache, shared, device) if any(m.step == 0 for m in active) else None
    position = min(member.step for member in active)
    current: list[Batch] = []

    def feed() -> Iterator[Batch]:
        while current:
            yield current[0]

    for member in active:
        member.read_times(claims.notes(member.entry.name, TIMES))
        member.run = fit_steps(
            member.entry.build(*member.entry.sizes(part.cache)).to(device),
            part.cache,
            member.entry.train,
            member.folder,
            resume=resume or member.step > 0,
            **often,
            stream=feed(),
            centre=centre,
        )
    grads = any(VARIANTS[m.entry.variant].needs_grads for m in active)
    try:
        with closing(batches(part.cache, shared, position, grads, device)) as stream:
            for batch in stream if position < until else ():
                current[:] = [batch]
                position += 1
                _abandon(active, claims.lost())
                for member in active:
                    _advance(part, member, position)
                yield
                if position == until or not any(m.run is not None for m in active):
                    break
        current.clear()
        if position == part.total and position not in part.rungs():
            for member in active:
                _finish(member)
    finally:
        _abandon(active, claims.lost())
        for member in active:
            if member.run is not None:
                member.run.close()
                member.run = None
            member.write_times(claims.notes(member.entry.name, TIMES))


def _abandon(active: Sequence[Member], lost: set[str]) -> None:
    for member in active:
        if member.entry.name in lost and member.run is not None:
            with suppress(Lost):
                member.run.throw(Lost())  # closing it would save a checkpoint
            member.run = None


def _advance(part: Part, member: Member, position: int) -> None:
    """Give a member the current batch, unless it saw the batch before."""
    if member.run is None or member.step >= position:
        return
    try:
        began, first = time.process_time(), member.last is None
        member.last = next(member.run)
        if not first:
            member.seconds, member.timed = member.seconds + time.process_time() - began, member.timed + 1
        member.step = member.last.step
    except Diverged as error:
        member.status, member.message, member.run, member.step = "diverged", str(error), None, position
        stopped = {"status": "diverged", "step": position, "message": str(error)}
        with part.record.change() as content:
            content["stopped"][member.entry.name] = stopped


def _finish(member: Member) -> None:
    """Calibrate a member and save it."""
    if member.run is not None:
        next(member.run, None)  # no batch is left, so this runs to its end
        member.status, member.run = "finished", None

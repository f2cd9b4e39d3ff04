"""Train the SAEs of a grid side by side: every batch is read once and used for each SAE that a process trains.

Any number of processes may work on one sweep. Each claims SAEs, trains them to the next rung (or to their end) in one
reading of the cache, and claims the next ones. What is decided, at a rung or about a learning rate, follows from the
files of all SAEs, so it does not matter which process does it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.files import lock
from saelab.sweep.caches import Caches
from saelab.sweep.claims import PATIENCE, Claims
from saelab.sweep.grid import Grid, check_grid
from saelab.sweep.member import TIMES, Member
from saelab.sweep.part import Part, State
from saelab.sweep.reading import read_together
from saelab.sweep.record import Record, label_of

WAIT = 0.5  # seconds between two looks at what other processes have done


def run_sweep(
    grid: Grid,
    caches: Caches | ActivationCache | Mapping[str, ActivationCache],
    folder: Path | str,
    *,
    resume: bool = False,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float = 10.0,
    device: torch.device | str = "cpu",
    at_once: int | None = None,
    claims: Claims | None = None,
) -> Generator[list[Member]]:
    """Train every entry of ``grid`` into ``folder/NAME``; yields the members after every batch, the entries' last.

    ``caches`` is one cache, or those that the grid was made for by name.

    Each SAE ends bit-identical to one that :func:`saelab.training.fit_steps` trains alone: it has its own optimizer,
    schedule and checkpoints. One that diverges is stopped, with the reason in its ``message``, and the others continue.
    Closing the generator saves all; after a kill at any moment ``resume=True`` continues, with the guarantee of
    :func:`saelab.training.fit_steps`. Raises UserError before anything trains if an entry is impossible, if the grid or
    the cache is not the one that was begun, or if the folder holds a sweep and ``resume`` is not set.

    With ``resume=True`` other processes may do the same in the same folder, on this or on other machines, and come to
    the same files. ``at_once`` is the largest number of SAEs that this one trains in one reading (all that are left by
    default). While others train what is left, the members are yielded twice a second. An SAE whose process dies is
    taken over (see :class:`saelab.sweep.claims.Claims`); ``claims`` are those of a caller that has more to do in the
    folder.

    Where learning rates are tuned, all SAEs train on ``grid.view(cache)``, without its validation rows. All rates of
    all groups (entries that differ only in their seed) train like other entries, at the first seed of their group. The
    one with the smallest FVU on the validation rows becomes that seed's SAE. Another reading trains the other seeds at
    that rate, and rates beyond the given multiples where the best was at the edge.
    """
    folder, caches = Path(folder), Caches.of(caches)
    check_grid(grid, caches)
    if at_once is not None and at_once < 1:
        raise UserError(f"at_once={at_once} must be at least 1")
    often = {"checkpoint_steps": checkpoint_steps, "checkpoint_minutes": checkpoint_minutes}
    own = Claims(folder, PATIENCE) if claims is None else claims
    try:
        record, known = Record(folder, own), {}
        grids = {pair: (part, part.view(caches.get(pair))) for pair, part in grid.parts().items()}
        record.begin(grid, {pair: cache for pair, (_, cache) in grids.items()}, resume)
        parts = [Part(part, cache, label_of(pair), folder, record, known) for pair, (part, cache) in grids.items()]
        with record.change():
            for part in parts:
                part.groups  # noqa: B018 - the rates to try are put into the record
        yield from _Sweep(grid, parts, record, own, resume, often, torch.device(device), at_once).run()
    finally:
        if claims is None:
            own.leave()


@dataclass(frozen=True)
class _Sweep:
    grid: Grid
    parts: list[Part]
    record: Record
    claims: Claims
    resume: bool
    often: dict[str, Any]  # when checkpoints are written
    device: torch.device
    at_once: int | None

    def run(self) -> Generator[list[Member]]:
        """Do what can be done until nothing is left."""
        while True:
            self.record.refresh()
            states = [part.survey() for part in self.parts]
            if any(part.decide(state) for part, state in zip(self.parts, states)):
                continue
            if all(state.done for state in states):
                break
            members = [member for state in states for member in state.members]
            if self.choose(states):
                continue
            for part in self.parts:
                state = part.survey()
                if active := self.claim(part, state):
                    state = part.survey()
                    yield from self.train(part, active, state, members)
                    break
            else:
                yield members
                time.sleep(WAIT)
        by_name = {member.entry.name: member for state in states for member in state.members}
        for name, member in by_name.items():
            member.read_times(self.claims.notes(name, TIMES))
        yield [by_name[entry.name] for entry in self.grid.entries]

    def choose(self, states: list[State]) -> bool:
        """Choose the learning rate of groups whose candidates have ended; whether there was one."""
        chosen = False
        for part, state in zip(self.parts, states):
            for group in state.open_groups:
                name = f"rates of {group.lead.name}"
                if self.claims.take(name):
                    self.record.refresh()  # another process may just have chosen it
                    for same in part.survey().open_groups:
                        if same.lead.name == group.lead.name:
                            part.choose(same, self.device)
                    self.claims.give_back(name)
                    chosen = True
        return chosen

    def claim(self, part: Part, state: State) -> list[Member]:
        """Members that can train, and that no other process has."""
        taken: list[Member] = []
        for member in state.members:
            if len(taken) == self.at_once:
                break
            if self.ready(part, member, state) and self.claims.take(member.entry.name):
                taken.append(member)
        if not taken:
            return []
        # They may have got on, or been stopped, since they were looked at.
        self.record.refresh()
        now = part.survey()
        active = [m for m in taken if m in now.members and self.ready(part, m, now) and _is_free(m.folder)]
        for member in taken:
            if member not in active:
                self.claims.give_back(member.entry.name)
        return active

    def ready(self, part: Part, member: Member, state: State) -> bool:
        """Whether a member has steps to go now, or has to be finished."""
        if member.status != "running":
            return False
        return member.step < part.target(member, state) or (
            member.step == part.total and part.total not in part.rungs()
        )

    def train(self, part: Part, active: list[Member], state: State, members: list[Member]) -> Generator[list[Member]]:
        """Train claimed members in one reading."""
        until = min(part.target(member, state) for member in active)
        try:
            for _ in read_together(part, active, until, self.resume, self.often, self.device):
                yield members
        finally:
            for member in active:
                self.claims.give_back(member.entry.name)
            part.cache.release()


def _is_free(folder: Path) -> bool:
    """Whether no process writes a run folder: one that was halted may still hold it after its claim was taken over."""
    if not folder.exists():
        return True
    try:
        with lock(folder):
            return True
    except UserError:
        return False

"""The SAEs of a sweep on one cache: how far each is, as the disk says, and what is to be done next.

All SAEs stop at each rung, whatever process trains them, and go on from their checkpoints when the rung is decided.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from saelab.data.cache import ActivationCache
from saelab.sweep.choice import CANDIDATES, Group, groups_of, validation_score
from saelab.sweep.grid import Entry, Grid
from saelab.sweep.halving import STRAGGLING, losers, stragglers
from saelab.sweep.member import TIMES, Member
from saelab.sweep.record import Record
from saelab.training import finished, n_steps
from saelab.training.checkpoints import latest_step, number_of


@dataclass(frozen=True)
class State:
    """The SAEs as they are on disk."""

    members: list[Member]  # that train now, or have ended
    tuned: list[list[Member]]  # those of each group whose learning rate is tuned
    open_groups: list[Group]  # whose rate can be chosen now

    @property
    def done(self) -> bool:
        return not self.open_groups and not any(member.status == "running" for member in self.members)


@dataclass(frozen=True)
class Part:
    """The SAEs on one cache. ``known`` holds the members that this process has seen, with what it measured."""

    grid: Grid
    cache: ActivationCache
    label: str  # before the step in the names of rungs
    folder: Path
    record: Record
    known: dict[str, Member]

    @property
    def total(self) -> int:
        """Steps of every SAE."""
        return n_steps(self.cache, self.grid.entries[0].train)

    @property
    def groups(self) -> list[Group]:
        """The groups whose rate is tuned, as the record has them now."""
        return groups_of(self.grid, self.cache, self.record.content, self.folder)

    def survey(self) -> State:
        """Look at the disk."""
        fixed = [self._member(entry, self.folder / entry.name) for entry in self.grid.entries if entry.rates is None]
        tuned, open_groups = [], []
        for group in self.groups:
            members = self._of_group(group)
            tuned.append(members)
            trying = (self.folder / CANDIDATES / group.lead.name).exists()
            if trying if group.settled else not any(member.status == "running" for member in members):
                open_groups.append(group)
        return State([*fixed, *(member for members in tuned for member in members)], tuned, open_groups)

    def _of_group(self, group: Group) -> list[Member]:
        if not group.settled:
            return [self._member(entry, group.place(entry)) for entry in group.candidates]
        if (self.folder / CANDIDATES / group.lead.name).exists():  # the chosen one is not yet at its place
            return []
        members = [self._member(entry, self.folder / entry.name) for entry in group.chosen]
        if not members:
            members = [self._known(Member(e, self.folder / e.name, status="diverged")) for e in group.entries]
        members[0].message = members[0].message or group.record["message"]
        for member in members:
            member.tried = group.record["tried"]
        return members

    def _known(self, member: Member) -> Member:
        """The member as this process knows it, with the state of ``member``."""
        known = self.known.setdefault(member.entry.name, member)
        known.entry, known.folder, known.status, known.step = member.entry, member.folder, member.status, member.step
        known.message, known.stop_at = member.message, member.stop_at
        return known

    def _member(self, entry: Entry, folder: Path) -> Member:
        member = Member(entry, folder)
        if finished(folder):
            member.status, member.step = "finished", self.total
        elif (path := latest_step(folder)) is not None:
            member.step = number_of(path)
        stopped = self.record.content["stopped"].get(entry.name)
        if stopped is not None:
            member.message = stopped["message"]
            if stopped["status"] == "diverged":
                member.status, member.step = "diverged", stopped["step"]
            else:
                member.stop_at = stopped["step"]
                member.status = "halted" if member.step >= stopped["step"] else "running"
        return self._known(member)

    def rungs(self) -> Mapping[int, float]:
        """The steps at which SAEs may be stopped and nothing has been decided yet, ascending, with their shares."""
        grid = self.grid
        early = STRAGGLING if grid.tuning is not None and grid.tuning.stop_early else ()
        shares = grid.halving.at if grid.halving is not None else early
        found = {round(share * self.total): share for share in shares}
        decided = self.record.content["rungs"]
        return {step: share for step, share in found.items() if step and f"{self.label}{step}" not in decided}

    def target(self, member: Member, state: State) -> int:
        """The step up to which a member can train now."""
        waits = self.grid.halving is not None or any(member in group for group in state.tuned)
        rungs = list(self.rungs()) if waits else []
        return min(self.total, member.stop_at or self.total, *rungs[:1])

    def decide(self, state: State) -> bool:
        """Decide the next rung if all SAEs that it is about have reached it; whether it has."""
        for rung, share in self.rungs().items():
            about = state.members if self.grid.halving is not None else [m for group in state.tuned for m in group]
            reached = any(member.step >= rung for member in state.members)
            if not reached or any(m.status == "running" and m.step < rung for m in about):
                return False
            running = [m for m in about if m.status == "running"]
            if self.grid.halving is not None:
                lost = losers(self.grid.halving, running, rung, self.total)
                reason = f"stopped by halving at step {rung}"
            else:
                lost = stragglers(state.tuned, share, rung, self.total)
                reason = f"stopped at step {rung}, where its FVU was over {STRAGGLING[share]:g} times the best rate's"
            with self.record.change() as content:
                if f"{self.label}{rung}" in content["rungs"]:
                    return True  # by another process, whose SAEs may have gone on since
                content["rungs"][f"{self.label}{rung}"] = [m.entry.name for m in lost]
                for member in lost:
                    content["stopped"][member.entry.name] = {"status": "halted", "step": rung, "message": reason}
            return True
        return False

    def choose(self, group: Group, device: torch.device) -> None:
        """Choose the rate of a group whose candidates have ended, or add one to try; the caller has its claim."""
        if not group.settled:
            score = validation_score(self.cache, device)
            for entry in group.candidates:
                group.try_out(self._member(entry, group.place(entry)), score)
            group.settle()
            with self.record.change() as content:
                content["tuning"][group.lead.name] = json.loads(json.dumps(group.record))
        chosen = [entry for entry in group.candidates if entry.train.lr == group.record["chosen"]]
        if group.settled and chosen:
            times, claims = Member(chosen[0], group.place(chosen[0])), self.record.claims
            times.read_times(claims.notes(chosen[0].name, TIMES))
            times.write_times(claims.notes(group.lead.name, TIMES))
        group.promote()

"""Train the SAEs of a grid side by side: every batch is read once and used for each of them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab.data.cache import ActivationCache, Batch
from saelab.errors import UserError, damaged
from saelab.files import lock, remove_partial, write_json
from saelab.layout import SWEEP
from saelab.sae import VARIANTS
from saelab.sweep.caches import Caches, Pair
from saelab.sweep.choice import CANDIDATES, Group, groups_of, validation_score
from saelab.sweep.grid import Entry, Grid, check_grid
from saelab.sweep.halving import STRAGGLING, losers, stragglers
from saelab.sweep.member import Member
from saelab.training import Diverged, batches, centre_of, finished, fit_steps, n_steps
from saelab.training.checkpoints import latest_step, number_of
from saelab.training.fitting import without_warmups


def run_sweep(
    grid: Grid,
    caches: Caches | ActivationCache | Mapping[str, ActivationCache],
    folder: Path | str,
    *,
    resume: bool = False,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float = 10.0,
    device: torch.device | str = "cpu",
) -> Generator[list[Member]]:
    """Train every entry of ``grid`` into ``folder/NAME``; yields the members after every batch, the entries' last.

    ``caches`` is one cache, or those that the grid was made for by name; they are read one after the other.

    Each SAE ends bit-identical to one that :func:`saelab.training.fit_steps` trains alone: it has its own optimizer,
    schedule and checkpoints. One that diverges is stopped, with the reason in its ``message``, and the others continue.
    Closing the generator saves all; after a kill at any moment ``resume=True`` continues, with the guarantee of
    :func:`saelab.training.fit_steps`. Raises UserError before anything trains if an entry is impossible, if the grid or
    the cache is not the one that was begun, if the folder holds a sweep and ``resume`` is not set, or if another
    process is writing it.

    Where learning rates are tuned, all SAEs train on ``grid.view(cache)``, without its validation rows. All rates of
    all groups (entries that differ only in their seed) train in the same reading of the cache as the other entries, at
    the first seed of their group. The one with the smallest FVU on the validation rows becomes that seed's SAE. Another
    reading trains the other seeds at that rate, and rates beyond the given multiples where the best was at the edge.
    """
    folder, caches = Path(folder), Caches.of(caches)
    check_grid(grid, caches)
    often = {"checkpoint_steps": checkpoint_steps, "checkpoint_minutes": checkpoint_minutes}
    with lock(folder):
        parts = {pair: (part, part.view(caches.get(pair))) for pair, part in grid.parts().items()}
        record = _open_record(folder, grid, {pair: cache for pair, (_, cache) in parts.items()}, resume)
        members: dict[str, Member] = {}
        for pair, (part, cache) in parts.items():
            groups = groups_of(part, cache, record, folder)
            sweep = _Sweep(part, cache, folder, resume, often, torch.device(device), record, groups, _label(pair))
            current: list[Member] = []
            for current in sweep.run():
                if len(parts) > 1:
                    yield [*members.values(), *current]
                else:
                    yield current
            members |= {member.entry.name: member for member in current}
            cache.release()
        if len(parts) > 1:
            yield [members[entry.name] for entry in grid.entries]


@dataclass(frozen=True)
class _Sweep:
    grid: Grid
    cache: ActivationCache
    folder: Path
    resume: bool
    often: dict[str, Any]  # when checkpoints are written
    device: torch.device
    record: dict[str, Any]  # the content of sweep.json
    groups: Sequence[Group]
    label: str = ""  # of its cache, where the sweep has several

    def run(self) -> Generator[list[Member]]:
        """Read the cache until nothing is left to train: once, and again where rates were tuned."""
        fixed = [self.member(entry, self.folder / entry.name) for entry in self.grid.entries if entry.rates is None]
        while True:
            tuned = [self.settled(group) for group in self.groups]
            members = [*fixed, *itertools.chain(*tuned)]
            if not any(member.status == "running" for member in members):
                break
            yield from self.read(members, tuned)
        by_name = {member.entry.name: member for member in members}
        yield [by_name[entry.name] for entry in self.grid.entries]

    @property
    def total(self) -> int:
        """Steps of every SAE."""
        return n_steps(self.cache, self.grid.entries[0].train)

    def save(self) -> None:
        """Write ``sweep.json``."""
        write_json(self.folder / SWEEP, self.record)

    def member(self, entry: Entry, folder: Path) -> Member:
        """An SAE as it is on disk."""
        member = Member(entry, folder)
        if finished(folder):
            member.status, member.step = "finished", self.total
        elif (path := latest_step(folder)) is not None:
            member.step = number_of(path)
        stopped = self.record["stopped"].get(entry.name)
        if stopped is not None:
            member.message = stopped["message"]
            if stopped["status"] == "diverged":
                member.status, member.step = "diverged", stopped["step"]
            else:
                member.stop_at = stopped["step"]
                member.status = "halted" if member.step >= stopped["step"] else "running"
        return member

    def settled(self, group: Group) -> list[Member]:
        """What a group trains next, or has trained; records rates that have ended, and chooses one if all have."""
        if not group.settled:
            score = validation_score(self.cache, self.device)
            for entry in group.candidates:
                group.try_out(self.member(entry, group.place(entry)), score)
            group.settle()
            self.save()
        group.promote()
        if not group.settled:
            return [self.member(entry, group.place(entry)) for entry in group.candidates]
        members = [self.member(entry, self.folder / entry.name) for entry in group.chosen]
        if not members:
            members = [Member(entry, self.folder / entry.name, status="diverged") for entry in group.entries]
        members[0].message = members[0].message or group.record["message"]
        for member in members:
            member.tried = group.record["tried"]
        return members

    def read(self, members: list[Member], tuned: Sequence[Sequence[Member]]) -> Generator[list[Member]]:
        """Train those that are running in one reading of the cache, from the step that the slowest has reached."""
        shared, active = self.grid.entries[0].train, [m for m in members if m.status == "running"]
        centre = centre_of(self.cache, shared, self.device) if any(m.step == 0 for m in active) else None
        position = min(m.step for m in active)
        current: list[Batch] = []

        def feed() -> Iterator[Batch]:
            while current:
                yield current[0]

        for member in active:
            member.run = fit_steps(
                member.entry.build(*member.entry.sizes(self.cache)).to(self.device),
                self.cache,
                member.entry.train,
                member.folder,
                resume=self.resume,
                **self.often,
                stream=feed(),
                centre=centre,
            )
        grads = any(VARIANTS[m.entry.variant].needs_grads for m in active)
        try:
            with closing(batches(self.cache, shared, position, grads, self.device)) as stream:
                for batch in stream:
                    current[:] = [batch]
                    position += 1
                    for member in active:
                        self.advance(member, position)
                    self.halve(members, tuned, position)
                    yield members
                    if not any(m.status == "running" for m in active):
                        break
            current.clear()
            for member in active:
                _finish(member)
        finally:
            for member in active:
                if member.run is not None:
                    member.run.close()

    def advance(self, member: Member, position: int) -> None:
        """Give a member the current batch, unless it saw the batch before a kill."""
        if member.status != "running" or member.run is None or member.step >= position:
            return
        try:
            began, first = time.process_time(), member.last is None
            member.last = next(member.run)
            if not first:
                member.seconds, member.timed = member.seconds + time.process_time() - began, member.timed + 1
            member.step = member.last.step
        except Diverged as error:
            member.status, member.message, member.run, member.step = "diverged", str(error), None, position
            self.record["stopped"][member.entry.name] = {
                "status": "diverged",
                "step": position,
                "message": str(error),
            }
            self.save()
        if member.step == member.stop_at:
            _halt(member)

    def halve(self, members: Sequence[Member], tuned: Sequence[Sequence[Member]], position: int) -> None:
        """Stop the worse SAEs where the step is a rung, and rates that are far behind where rates are tuned."""
        grid, total = self.grid, self.total
        shares = grid.halving.at if grid.halving is not None else STRAGGLING if self.stops_early else ()
        for share in shares:
            rung = round(share * total)
            if rung != position or f"{self.label}{rung}" in self.record["rungs"]:
                continue
            if grid.halving is not None:
                lost = losers(grid.halving, [m for m in members if m.status == "running"], rung, total)
                reason = f"stopped by halving at step {rung}"
            else:
                lost = stragglers(tuned, share, rung, total)
                reason = f"stopped at step {rung}, where its FVU was over {STRAGGLING[share]:g} times the best rate's"
            self.stop(lost, rung, reason)

    @property
    def stops_early(self) -> bool:
        """Whether rates that are far behind are stopped: in the first reading, while all of them train."""
        return self.grid.tuning is not None and self.grid.tuning.stop_early

    def stop(self, lost: Sequence[Member], rung: int, reason: str) -> None:
        """Stop members at the current step."""
        # The decision is saved first, so that a resumed sweep stops the same SAEs at the same step.
        self.record["rungs"][f"{self.label}{rung}"] = [m.entry.name for m in lost]
        for member in lost:
            self.record["stopped"][member.entry.name] = {"status": "halted", "step": rung, "message": reason}
        self.save()
        for member in lost:
            member.stop_at, member.message = rung, reason
            _halt(member)


def _halt(member: Member) -> None:
    if member.run is not None:
        member.run.close()
    member.status, member.run = "halted", None


def _finish(member: Member) -> None:
    """Calibrate a member and save it."""
    if member.status == "running" and member.run is not None:
        next(member.run, None)  # no batch is left, so this runs to its end
        member.status, member.run = "finished", None


def _label(pair: Pair) -> str:
    """What precedes a step in the names of rungs."""
    return "".join(f"{name}:" for name in pair if name)


def _fingerprint(cache: ActivationCache) -> str:
    return cache.fingerprint + ("" if cache.target is None else f">{cache.target.fingerprint}")


def _open_record(folder: Path, grid: Grid, caches: Mapping[Pair, ActivationCache], resume: bool) -> dict[str, Any]:
    """``sweep.json``: the grid and the caches, the rungs that were decided, and the SAEs that were stopped."""
    fingerprints = {_label(pair).rstrip(":"): _fingerprint(cache) for pair, cache in caches.items()}
    paths = {_label(pair).rstrip(":"): str(cache.path) for pair, cache in caches.items()}
    alone = list(fingerprints) == [""]
    known = {"cache_fingerprint": fingerprints[""] if alone else fingerprints}
    about = json.loads(json.dumps({"grid": grid.content(), **known}))
    path = folder / SWEEP
    if resume and path.is_file():
        for run in (folder, *(folder / entry.name for entry in grid.entries), *folder.glob(f"{CANDIDATES}/*/*")):
            remove_partial(run)
        with damaged(path, "start the sweep again with --overwrite"):
            record = json.loads(path.read_bytes())
            before = {name: record[name] for name in about}
            for entry in before["grid"]["entries"]:
                entry["train"], moved = without_warmups(entry["train"])
                entry["options"] |= moved
            if not isinstance(record["rungs"], dict) or not isinstance(record["stopped"], dict):
                raise TypeError("rungs and stopped are not tables")
            for name, group in record.get("tuning", {}).items():
                if not {"rates", "given", "tried", "chosen"} <= group.keys():
                    raise TypeError(f"the rates of {name} are incomplete")
        for part, remedy in (("cache_fingerprint", "restore the cache"), ("grid", "use the grid it was begun with")):
            if before[part] != about[part]:
                raise UserError(f"{folder} was begun with another {part.split('_')[0]}; {remedy} or start a new sweep")
        for cache in caches.values():
            cache.verify()
        return record
    if path.is_file():  # its SAEs would count as trained, whatever the new grid says
        raise UserError(f"{folder} holds a sweep; continue it with resume, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    record = {**about, "cache": paths[""] if alone else paths, "rungs": {}, "stopped": {}}
    write_json(path, record)
    return record

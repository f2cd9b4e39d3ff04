"""Train the SAEs of a grid side by side: every batch is read once and used for each of them."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from saelab.data.cache import ActivationCache, Batch
from saelab.errors import UserError, damaged
from saelab.files import lock, remove_partial, write_json
from saelab.layout import SWEEP
from saelab.sae import VARIANTS
from saelab.sweep.grid import Entry, Grid, check_grid
from saelab.sweep.halving import losers
from saelab.sweep.member import Member
from saelab.training import Diverged, batches, centre_of, finished, fit_steps, n_steps
from saelab.training.checkpoints import latest_step, number_of
from saelab.training.fitting import without_warmups


def run_sweep(
    grid: Grid,
    cache: ActivationCache,
    folder: Path | str,
    *,
    resume: bool = False,
    checkpoint_steps: int = 500,
    device: torch.device | str = "cpu",
) -> Generator[list[Member]]:
    """Train every entry of ``grid`` into ``folder/NAME``; yields the members after every batch.

    Each SAE ends bit-identical to one that :func:`saelab.training.fit_steps` trains alone: it has its own optimizer,
    schedule and checkpoints. One whose loss is not finite is stopped, with the reason in its ``message``, and the
    others continue. Closing the generator saves all; after a kill at any moment ``resume=True`` continues, with the
    guarantee of :func:`saelab.training.fit_steps`. Raises UserError before anything trains if an entry is impossible,
    or the grid or the cache is not the one that was begun, or another process is writing the folder.
    """
    check_grid(grid, cache)
    with lock(Path(folder)):
        yield from _run(grid, cache, Path(folder), resume, checkpoint_steps, device)


def _run(
    grid: Grid, cache: ActivationCache, folder: Path, resume: bool, checkpoint_steps: int, device: torch.device | str
) -> Generator[list[Member]]:
    record = _open_record(folder, grid, cache, resume)
    shared = grid.entries[0].train
    total = n_steps(cache, shared)
    members = [_member(entry, folder / entry.name, record, total) for entry in grid.entries]
    active = [m for m in members if m.status == "running"]
    centre = centre_of(cache, shared, torch.device(device)) if any(m.step == 0 for m in active) else None
    position = min((m.step for m in active), default=total)
    current: list[Batch] = []

    def feed() -> Iterator[Batch]:
        while current:
            yield current[0]

    for member in active:
        sae = member.entry.build(cache.d_in).to(device)
        member.run = fit_steps(
            sae,
            cache,
            member.entry.train,
            member.folder,
            resume=resume,
            checkpoint_steps=checkpoint_steps,
            stream=feed(),
            centre=centre,
        )
    grads = any(VARIANTS[m.entry.variant].needs_grads for m in active)
    try:
        with closing(batches(cache, shared, position, grads)) as stream:
            for batch in stream:
                current[:] = [batch]
                position += 1
                for member in members:
                    _advance(member, position, record, folder)
                _halve(grid, members, position, total, record, folder)
                yield members
                if not any(m.status == "running" for m in members):
                    break
        current.clear()
        for member in members:
            _finish(member)
        yield members
    finally:
        for member in members:
            if member.run is not None:
                member.run.close()


def _advance(member: Member, position: int, record: dict[str, Any], folder: Path) -> None:
    """Give a member the current batch, unless it saw the batch before a kill."""
    if member.status != "running" or member.run is None or member.step >= position:
        return
    try:
        member.last = next(member.run)
        member.step = member.last.step
    except Diverged as error:
        member.status, member.message, member.run, member.step = "diverged", str(error), None, position
        record["stopped"][member.entry.name] = {"status": "diverged", "step": position, "message": str(error)}
        write_json(folder / SWEEP, record)
    if member.step == member.stop_at:
        _halt(member)


def _halve(grid: Grid, members: list[Member], position: int, total: int, record: dict[str, Any], folder: Path) -> None:
    if grid.halving is None:
        return
    for rung in (round(share * total) for share in grid.halving.at):
        if rung != position or str(rung) in record["rungs"]:
            continue
        lost = losers(grid.halving, [m for m in members if m.status == "running"], rung, total)
        # The decision is saved first, so that a resumed sweep stops the same SAEs at the same step.
        record["rungs"][str(rung)] = [m.entry.name for m in lost]
        message = f"stopped by halving at step {rung}"
        for member in lost:
            record["stopped"][member.entry.name] = {"status": "halted", "step": rung, "message": message}
        write_json(folder / SWEEP, record)
        for member in lost:
            member.stop_at, member.message = rung, message
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


def _member(entry: Entry, folder: Path, record: dict[str, Any], total: int) -> Member:
    member = Member(entry, folder)
    if finished(folder):
        member.status, member.step = "finished", total
    elif (path := latest_step(folder)) is not None:
        member.step = number_of(path)
    stopped = record["stopped"].get(entry.name)
    if stopped is not None:
        member.message = stopped["message"]
        if stopped["status"] == "diverged":
            member.status, member.step = "diverged", stopped["step"]
        else:
            member.stop_at = stopped["step"]
            member.status = "halted" if member.step >= stopped["step"] else "running"
    return member


def _open_record(folder: Path, grid: Grid, cache: ActivationCache, resume: bool) -> dict[str, Any]:
    """``sweep.json``: the grid and the cache, the rungs that were decided, and the SAEs that were stopped."""
    about = json.loads(json.dumps({"grid": grid.content(), "cache_fingerprint": cache.fingerprint}))
    path = folder / SWEEP
    if resume and path.is_file():
        for run in (folder, *(folder / entry.name for entry in grid.entries)):
            remove_partial(run)
        with damaged(path, "start the sweep again with --overwrite"):
            record = json.loads(path.read_bytes())
            before = {name: record[name] for name in about}
            for entry in before["grid"]["entries"]:
                entry["train"], moved = without_warmups(entry["train"])
                entry["options"] |= moved
            if not isinstance(record["rungs"], dict) or not isinstance(record["stopped"], dict):
                raise TypeError("rungs and stopped are not tables")
        for part, remedy in (("cache_fingerprint", "restore the cache"), ("grid", "use the grid it was begun with")):
            if before[part] != about[part]:
                raise UserError(f"{folder} was begun with another {part.split('_')[0]}; {remedy} or start a new sweep")
        cache.verify()
        return record
    folder.mkdir(parents=True, exist_ok=True)
    record = {**about, "cache": str(cache.path), "rungs": {}, "stopped": {}}
    write_json(path, record)
    return record

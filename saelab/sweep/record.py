"""``sweep.json``: the grid and the caches of a sweep, the rungs that were decided, and the SAEs that were stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, damaged
from saelab.files import remove_partial, write_json
from saelab.layout import SWEEP
from saelab.sweep.caches import Pair
from saelab.sweep.choice import CANDIDATES
from saelab.sweep.claims import Claims
from saelab.sweep.grid import Grid
from saelab.training.fitting import without_warmups

CLAIM = "sweep.json"


class Record:
    """The file, which several processes change: each change reads it again and writes it while no other does."""

    def __init__(self, folder: Path, claims: Claims) -> None:
        self.folder, self.path, self.claims = folder, folder / SWEEP, claims
        self.content: dict[str, Any] = {}

    def refresh(self) -> None:
        """Read what others have written."""
        with damaged(self.path, "start the sweep again with --overwrite"):
            self.content = _checked(json.loads(self.path.read_bytes()))

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """The content, newly read; it is written when the block ends, if it differs."""
        with self.claims.only(CLAIM):
            self.refresh()
            before = json.dumps(self.content)
            yield self.content
            # The order does not tell which process was first.
            self.content["stopped"] = dict(sorted(self.content["stopped"].items()))
            self.content["rungs"] = dict(sorted(self.content["rungs"].items(), key=lambda rung: _place(rung[0])))
            if json.dumps(self.content) != before:
                write_json(self.path, self.content)

    def begin(self, grid: Grid, caches: Mapping[Pair, ActivationCache], resume: bool) -> None:
        """Begin the record, or continue with it. UserError for another grid or other caches than it was begun with."""
        with self.claims.only(CLAIM):
            goes_on = self._begin(grid, caches, resume)
        if goes_on:
            for cache in caches.values():
                if cache.folder.local is not None:  # a store checks its own bytes
                    cache.verify()  # the fingerprint covers the manifest, this covers the activations

    def _begin(self, grid: Grid, caches: Mapping[Pair, ActivationCache], resume: bool) -> bool:
        """Whether the sweep goes on after nobody was at work on it."""
        fingerprints = {label_of(pair).rstrip(":"): _fingerprint(cache) for pair, cache in caches.items()}
        paths = {label_of(pair).rstrip(":"): str(cache.path) for pair, cache in caches.items()}
        alone = list(fingerprints) == [""]
        known = {"cache_fingerprint": fingerprints[""] if alone else fingerprints}
        about = json.loads(json.dumps({"grid": grid.content(), **known}))
        if resume and self.path.is_file():
            joins = self.claims.others()
            self._clean(grid, joins)
            self.refresh()
            with damaged(self.path, "start the sweep again with --overwrite"):
                before = {name: self.content[name] for name in about}
            for part, remedy in (
                ("cache_fingerprint", "restore the cache"),
                ("grid", "use the grid it was begun with"),
            ):
                if before[part] != about[part]:
                    raise UserError(
                        f"{self.folder} was begun with another {part.split('_')[0]}; {remedy} or start a new sweep"
                    )
            return not joins
        if self.path.is_file():  # its SAEs would count as trained, whatever the new grid says
            raise UserError(f"{self.folder} holds a sweep; continue it with resume, or choose another folder")
        self.content = {**about, "cache": paths[""] if alone else paths, "rungs": {}, "stopped": {}}
        write_json(self.path, self.content)
        return False

    def _clean(self, grid: Grid, joins: bool) -> None:
        """Remove what killed processes left behind half-written; only the record's while others are at work."""
        remove_partial(self.folder, SWEEP)
        if joins:
            return
        for path in (*self.claims.folder.glob("*.row"), *self.claims.folder.glob("*.written")):
            path.unlink()  # measured by processes that were killed before the report
        for folder in (
            self.folder,
            *(self.folder / entry.name for entry in grid.entries),
            *self.folder.glob(f"{CANDIDATES}/*/*"),
        ):
            remove_partial(folder)


def label_of(pair: Pair) -> str:
    """What precedes a step in the names of rungs."""
    return "".join(f"{name}:" for name in pair if name)


def _place(rung: str) -> tuple[str, int]:
    label, _, step = rung.rpartition(":")
    return label, int(step)


def _fingerprint(cache: ActivationCache) -> str:
    return cache.fingerprint + ("" if cache.target is None else f">{cache.target.fingerprint}")


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the options of this release; KeyError and TypeError for one that is damaged."""
    for entry in record["grid"]["entries"]:
        entry["train"], moved = without_warmups(entry["train"])
        entry["options"] |= moved
    if not isinstance(record["rungs"], dict) or not isinstance(record["stopped"], dict):
        raise TypeError("rungs and stopped are not tables")
    for name, group in record.get("tuning", {}).items():
        if not {"rates", "given", "tried", "chosen"} <= group.keys():
            raise TypeError(f"the rates of {name} are incomplete")
    return record

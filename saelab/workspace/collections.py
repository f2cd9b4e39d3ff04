"""Named sets of latents, of one SAE or several, with notes: ``collections.json`` of the folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from saelab.errors import UserError, damaged
from saelab.files import write_json
from saelab.layout import COLLECTIONS
from saelab.runs import Run
from saelab.workspace.notes import read_notes

BOOKMARKS = "bookmarks"
_lock = threading.Lock()  # two browser tabs may save at once


@dataclass(frozen=True)
class Member:
    """A latent's pole, and why it is there."""

    run: str
    latent: int
    pole: int = 1
    note: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """What it is, without the note."""
        return self.run, self.latent, self.pole


@dataclass(frozen=True)
class Collection:
    """Members in the order in which they were added."""

    name: str
    note: str = ""
    members: tuple[Member, ...] = field(default=())


def read_collections(root: Path | str) -> dict[str, Collection]:
    """All collections of a folder by name; empty where none was made."""
    path = Path(root) / COLLECTIONS
    if not path.is_file():
        return {}
    with damaged(path, "correct or remove it"):
        found = {}
        for name, entry in json.loads(path.read_bytes()).items():
            rows = entry["members"]
            members = [Member(str(r["run"]), int(r["latent"]), int(r["pole"]), str(r.get("note", ""))) for r in rows]
            found[str(name)] = Collection(str(name), str(entry.get("note", "")), tuple(members))
        return found


def add(root: Path | str, name: str, members: Iterable[Member]) -> None:
    """Put latents into a collection, which is made where there is none; one that is in it keeps its place and gets the
    new note. Raises UserError for a name without letters."""
    name, new = name.strip(), {member.key: member for member in members}
    if not name:
        raise UserError("give the collection a name")

    def change(known: dict[str, Collection]) -> None:
        old = known.get(name, Collection(name))
        merged = {member.key: member for member in old.members}
        merged |= {key: m if m.note or key not in merged else merged[key] for key, m in new.items()}
        known[name] = replace(old, members=tuple(merged.values()))

    _change(root, change)


def remove(root: Path | str, name: str, members: Iterable[Member]) -> None:
    """Take latents out of a collection."""
    gone = {member.key for member in members}

    def change(known: dict[str, Collection]) -> None:
        if name in known:
            kept = tuple(member for member in known[name].members if member.key not in gone)
            known[name] = replace(known[name], members=kept)

    _change(root, change)


def describe(root: Path | str, name: str, note: str) -> None:
    """Set the note of a collection."""

    def change(known: dict[str, Collection]) -> None:
        if name in known:
            known[name] = replace(known[name], note=note.strip())

    _change(root, change)


def delete(root: Path | str, name: str) -> None:
    """Remove a collection; its latents stay where they are."""
    _change(root, lambda known: known.pop(name, None))


def rows(collection: Collection, runs: dict[str, Run]) -> list[dict[str, Any]]:
    """What is known of each member, for a table and for export: labels, score, density, words and notes.

    A member whose SAE or index is not there keeps its name alone.
    """
    found = []
    for member in collection.members:
        row: dict[str, Any] = asdict(member)
        run = runs.get(member.run)
        if run is not None and run.index is not None and member.latent < run.index.d_sae:
            poles = run.index.poles
            known = run.index.latent(member.latent, member.pole if member.pole in poles else 1)
            own = read_notes(str(run.path)).get(member.latent, {})
            row |= {
                "my label": own.get("label", ""),
                "label": known["label"],
                "label_score": known["label_score"],
                "density": known["density"],
                "words": " ".join(known.get("words") or known["top_tokens"]),
            }
        found.append(row)
    return found


def _change(root: Path | str, change: Callable[[dict[str, Collection]], Any]) -> None:
    with _lock:
        known = read_collections(root)
        change(known)
        content = {name: {"note": c.note, "members": [asdict(m) for m in c.members]} for name, c in known.items()}
        write_json(Path(root) / COLLECTIONS, content)

"""Local copies of folders in an object store: runs are read and written here, and carried there whole.

Training, indexing and the app need files that can be renamed, locked and memory-mapped. The folder behind a URL has a
copy on the local disk (below :func:`saelab.files.cache_home`). A list in the store (``listing.json``) names the files
of the folder with their checksums; what it does not name does not exist. A file is uploaded before the list names it,
and the list drops a file before it is replaced, so a reader gets one state of the folder or waits for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saelab.errors import UserError, damaged
from saelab.files import LOCK, cache_home, lock, partial_path, replace, url_of, write_json
from saelab.layout import CHECKPOINTS
from saelab.stores import Lease, Store, lease

LISTING = "listing.json"
STATE = ".saelab-copy.json"  # in a copy: the files as they were when it was last the same as the store
MARK = "mark "
TRIES, PAUSE = 5, 1.0  # looks at a folder that is being written, and seconds between them
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A file as the list describes it: its first ``bytes`` bytes, and their checksum; in a folder without a list, the
    store's own mark in place of the checksum."""

    bytes: int
    sha256: str


@dataclass
class Listing:
    """The files of a folder in a store, and the number of this state of it; no number where saelab wrote no list."""

    files: dict[str, Entry] = field(default_factory=dict)
    revision: str = ""

    def to_json(self) -> bytes:
        """The content of the list."""
        return json.dumps({"revision": self.revision, "files": self.files}, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, where: str) -> Listing:
        """The list in ``data``; UserError where it is not one, or names a file outside the folder."""
        with damaged(f"{where}/{LISTING}", "remove it, or write the run again"):
            content = json.loads(data)
            files = {str(name): Entry(int(e[0]), str(e[1])) for name, e in content["files"].items()}
            for name in files:
                if not is_inside(name):
                    raise ValueError(f"{name!r} does not lie in the folder")
            return cls(files, str(content["revision"]))


def is_inside(name: str) -> bool:
    """Whether a relative name with ``/`` leads to a place below the folder that it is relative to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and not {"\\", ":", "\0"} & set(name)


class Copy:
    """The local copy, in ``folder``, of one folder behind a URL. ``wanted`` chooses from a folder without a list."""

    def __init__(self, url: str, folder: Path | None = None, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.url, self.store, self.wanted = url, Store(url), wanted
        self.folder = folder or place_of(url)
        self.held: Lease | None = None

    def pull(self, *, empty: bool = False) -> Path:
        """Make the copy as the store is, but for what was changed here and not carried there yet.

        Raises UserError where the store holds nothing, unless ``empty``, and where both have changed.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.folder, beside=True, wait=True):
            for left in reversed(range(TRIES)):
                there = self._there()
                if not there.files and not there.revision and not empty:
                    self.store.check_bucket()
                    raise UserError(f"{self.url} holds nothing; check the address")
                try:
                    self._fetch(there)
                    break
                except FileNotFoundError:  # a writer is at work
                    if left == 0:
                        raise UserError(
                            f"{self.url} is being written, or damaged: its files do not fit {LISTING}; wait for the "
                            "writer, or write the run again"
                        ) from None
                    time.sleep(PAUSE)
        return self.folder

    def _there(self) -> Listing:
        """What the store holds."""
        try:
            return Listing.parse(self.store.read(LISTING), self.url)
        except FileNotFoundError:
            return Listing(
                {
                    name: Entry(size, MARK + mark)
                    for name, (size, mark) in self.store.objects().items()
                    if is_inside(name) and _travels(name) and self.wanted(name)
                }
            )

    def _fetch(self, there: Listing) -> None:
        before, stamps = self._state()
        changed = self.changed()
        for name, entry in there.files.items():
            path = self.folder / name
            if before.files.get(name) == entry and (path.exists() or name in changed):
                continue  # the store's has not changed; it may have been removed here
            if name in changed and not (path.exists() and self._same(path, entry)):
                raise UserError(
                    f"{name} has changed both in {self.url} and in its copy {self.folder}; remove the copy to take "
                    "the store's"
                )
            if name not in changed:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace(path, lambda partial, name=name, entry=entry: self._download(name, entry, partial))
            stamps[name] = _stamp(path)
        for name in before.files.keys() - there.files.keys() - changed:
            (self.folder / name).unlink(missing_ok=True)
        if there.files or self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remember(there, stamps)

    def _download(self, name: str, entry: Entry, to: Path) -> None:
        self.store.ask("get_file", self.store.key(name), str(to))
        if to.stat().st_size > entry.bytes:  # a log that has grown since
            os.truncate(to, entry.bytes)
        if not self._same(to, entry):
            raise FileNotFoundError(name)

    @staticmethod
    def _same(path: Path, entry: Entry) -> bool:
        same = path.stat().st_size == entry.bytes
        return same and (entry.sha256.startswith(MARK) or entry.sha256 == checksum(path, entry.bytes))

    def _state(self) -> tuple[Listing, dict[str, list[int]]]:
        path = self.folder / STATE
        if not path.is_file():
            return Listing(), {}
        with damaged(path, f"remove {self.folder}"):
            content = json.loads(path.read_bytes())
            return Listing.parse(json.dumps(content["listing"]).encode(), str(path)), dict(content["stamps"])

    def _remember(self, listing: Listing, stamps: Mapping[str, list[int]]) -> None:
        stamps = {name: stamps[name] for name in listing.files if name in stamps}
        write_json(self.folder / STATE, {"listing": json.loads(listing.to_json()), "stamps": stamps})

    def changed(self) -> set[str]:
        """Names of the files that were written or removed here since the copy was last the same as the store."""
        stamps = self._state()[1]
        here = files_in(self.folder)
        return {name for name, path in here.items() if stamps.get(name) != _stamp(path)} | (stamps.keys() - here.keys())

    def has_files(self) -> bool:
        """Whether the copy holds a file that travels."""
        return bool(files_in(self.folder))

    def push(self, source: Path | None = None) -> None:
        """Carry what was changed here into the store; ``source`` holds the files in place of the copy.

        Raises UserError where the store has changed too, and OSError where it gives no answer: the copy then still
        holds everything, and the next call carries it.
        """
        # Others on this machine who want the copy wait until it is the same as the store.
        with lock(self.folder, beside=True, wait=True):
            self._push(source)

    def _push(self, source: Path | None) -> None:
        if self.held is not None:
            self.held.check()
        before, stamps = self._state()
        here = files_in(source or self.folder)
        new = {name: _stamp(path) for name, path in here.items()}
        if new == stamps and (before.revision or not new):
            return
        there = self._there()
        if there.revision != before.revision:
            raise UserError(f"{self.url} was changed by another process; the results are in {self.folder}")
        kept = {name: entry for name, entry in before.files.items() if new.get(name) == stamps.get(name, [])}
        fresh = {n: _entry(p, new[n][0]) for n, p in here.items() if n not in kept}
        same = {name for name, entry in fresh.items() if before.files.get(name) == entry}
        grown = {n for n, e in before.files.items() if n in fresh.keys() - same and _begins(here[n], e)}
        self._publish({n: e for n, e in before.files.items() if n in kept or n in same | grown}, before)
        for name in fresh.keys() - same:
            if self.held is not None:
                self.held.check()
            if self.store.has_folders:
                self.store.ask("makedirs", self.store.key(name).rpartition("/")[0], exist_ok=True)
            self.store.ask("put_file", str(here[name]), self.store.key(name))
        if self.held is not None:
            self.held.check()
        after = Listing({**kept, **fresh}, secrets.token_hex(8))
        self.store.write(LISTING, after.to_json())
        # Checkpoints that a killed process had no time to remove are also removed.
        left = {name for name in self.store.sizes() if name.startswith(f"{CHECKPOINTS}/")}
        for name in (before.files.keys() | left) - after.files.keys():
            self.store.remove(name)
        self._remember(after, new)

    def _publish(self, files: dict[str, Entry], before: Listing) -> None:
        """Drop from the list what is about to be replaced or removed; also marks a new folder as one with a list."""
        if files == before.files and before.revision:
            return
        middle = Listing(files, secrets.token_hex(8))
        self.store.write(LISTING, middle.to_json())
        _, stamps = self._state()
        self._remember(middle, stamps)

    def snapshot(self) -> Path:
        """A folder with the files as they are now, to be carried while the copy is being written; to be removed.

        Files of checkpoints never change, so they are linked; the others are copied.
        """
        target = partial_path(self.folder)
        for name, path in files_in(self.folder).items():
            to = target / name
            to.parent.mkdir(parents=True, exist_ok=True)
            if "/" in name:
                _link(path, to)
            else:
                shutil.copy2(path, to)
        return target

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other machines from writing the folder while the block lasts."""
        with lease(self.store) as self.held:
            try:
                yield
            finally:
                self.held = None


def place_of(url: str) -> Path:
    """Where the copy of a URL lies: a folder of its last name."""
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache_home() / "copies" / mark / (PurePosixPath(url.partition("://")[2]).name or "store")


def pull_tree(url: str) -> Path:
    """A copy of everything below a URL that the app shows: runs, sweeps, SAEs of other tools, but no activations.

    Each folder with a list is copied by its list. Caches, and checkpoints of runs in training, are left out.
    """
    root, store = place_of(f"{url}//tree").with_name(PurePosixPath(url).name), Store(url)
    names = store.objects()
    if not names:
        store.check_bucket()
        raise UserError(f"{url} holds nothing; check the address")
    listed = {name.rpartition("/")[0] for name in names if PurePosixPath(name).name == LISTING and is_inside(name)}
    caches = {name.rpartition("/")[0] for name in names if PurePosixPath(name).name.startswith("manifest.")}

    def wanted(name: str) -> bool:
        above = {"" if str(p) == "." else str(p) for p in PurePosixPath(name).parents}
        return not above & (listed | caches) and CHECKPOINTS not in PurePosixPath(name).parts

    if "" not in listed:
        Copy(url, root, wanted).pull(empty=True)
    for name in sorted(listed):
        Copy(f"{url}/{name}".rstrip("/"), root / name).pull()
    for state in root.rglob(STATE):  # runs that have been removed since
        if state.parent != root and state.parent.relative_to(root).as_posix() not in listed:
            shutil.rmtree(state.parent)
    return root


def files_in(folder: Path) -> dict[str, Path]:
    """The files of a folder that travel, by their names relative to it with ``/``."""
    if not folder.is_dir():
        return {}
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in sorted(found.items()) if _travels(name)}


def _travels(name: str) -> bool:
    """Whether a file belongs to the folder: hidden ones are locks and what is being written."""
    return name not in (LISTING, LOCK) and not any(part.startswith(".") for part in name.split("/"))


def checksum(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first ``size`` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(path, to)


def _entry(path: Path, size: int) -> Entry:
    return Entry(size, checksum(path, size))


def _begins(path: Path, entry: Entry) -> bool:
    """Whether a file begins with what the entry describes: a log that has grown."""
    return path.stat().st_size >= entry.bytes and checksum(path, entry.bytes) == entry.sha256


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


_opened: dict[str, Copy] = {}  # those whose changes are carried at the end of a command


def fetched(name: Path | str) -> Path | None:
    """The local copy of the run at a URL, as the store has it now; None for what is no URL."""
    url = url_of(name)
    if url is None:
        return None
    copy = Copy(url)
    copy.pull()
    _opened[url] = copy
    return copy.folder


def carry_all() -> list[str]:
    """Carry what was changed in the copies that this process opened; returns the URLs of those that had changes."""
    carried = []
    while _opened:
        url, copy = _opened.popitem()
        if copy.changed():
            with copy.writing():
                copy.push()
            carried.append(url)
    return carried

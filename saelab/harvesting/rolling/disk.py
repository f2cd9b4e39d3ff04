"""What a rolling cache has on disk: never more than its limit, and a list of what every segment held."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import discard
from saelab.data.packing import Place
from saelab.errors import UserError, damaged
from saelab.harvesting.rolling.config import BLOCK, GB
from saelab.harvesting.rolling.passes import Spot
from saelab.layout import MANIFEST, ROLLING, SEGMENTS


def used(root: Path) -> int:
    """Bytes of disk that the files below a folder take, in whole blocks."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a partial file that has just got its name
                total += _blocks((Path(folder) / name).stat().st_size)
    return total


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class Bounded(Folder):
    """A local folder below ``root`` that writes no file with which all files there would take more than ``limit``."""

    def __init__(self, path: Path, root: Path, limit: int) -> None:
        super().__init__(path)
        self.root_folder, self.limit = root, limit

    def write(self, name: str, data: bytes) -> None:
        # What is replaced is still there while the new file is written.
        if (total := used(self.root_folder) + _blocks(len(data))) > self.limit:
            raise UserError(
                f"{name} would bring {self.root_folder} to {total / GB:.4g} GB, above its limit of "
                f"{self.limit / GB:.4g} GB; raise --cache-gb"
            )
        super().write(name, data)


@dataclass
class Segment:
    """What a segment held, and where in the text the next one begins."""

    passes: int
    rows: int
    fingerprint: str
    end: Spot | None = field(default=None, compare=False)  # unknown where an earlier version wrote the record

    @classmethod
    def of(cls, content: dict[str, Any]) -> Segment:
        """That of ``dataclasses.asdict``."""
        end = content.pop("end", None)
        return cls(**content, end=end and Spot(end["reading"], Place(**end["place"])))


@dataclass
class Record:
    """The content of ``rolling.json``: settings by which the rows and their order are fixed, and the segments so far.

    ``start`` is the first forward pass of the text that is trained on, and ``begin`` its place in the text.
    ``shares_document`` says that the document there is also the last one that was kept, because it is long.
    """

    settings: dict[str, Any]
    start: int = 0
    shares_document: bool = False
    begin: Place | None = None
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> Record | None:
        """The record in a folder; None where there is none."""
        path = root / ROLLING
        if not path.is_file():
            return None
        with damaged(path, "start again with --overwrite"):
            content = json.loads(path.read_bytes())
            segments = [Segment.of(one) for one in content.pop("segments")]
            begin = content.pop("begin", None)
            return cls(**content, begin=begin and Place(**begin), segments=segments)

    def write(self, folder: Folder) -> None:
        """Save it."""
        folder.write(ROLLING, json.dumps(asdict(self)).encode())

    def first_row(self, number: int) -> int:
        """Rows before a segment that is known, or the next one."""
        return sum(segment.rows for segment in self.segments[:number])

    def segment_of(self, row: int) -> int:
        """The segment that a row of the stream is in; the next unknown one for later rows."""
        for number, segment in enumerate(self.segments):
            row -= segment.rows
            if row < 0:
                return number
        return len(self.segments)

    def spot_before(self, number: int) -> tuple[Spot | None, int]:
        """The last known place of the stream at or before the start of a segment, None for the first one of all; and
        the forward passes from there to the segment."""
        passes = 0
        for segment in reversed(self.segments[:number]):
            if segment.end is not None:
                return segment.end, passes
            passes += segment.passes
        return None, passes


class Disk:
    """The segments of a rolling cache in the folder ``root``, of at most ``segment_bytes`` each."""

    def __init__(self, root: Path, limit: int, segment_bytes: int) -> None:
        self.root, self.limit, self.segment_bytes = root, limit, segment_bytes

    def place(self, number: int) -> Path:
        """The folder of a segment."""
        return self.root / SEGMENTS / f"{number:06d}"

    def folder(self, number: int) -> Bounded:
        """The same, to write into."""
        return Bounded(self.place(number), self.root, self.limit)

    def complete(self, number: int) -> bool:
        """Whether a segment is on disk as a whole."""
        return (self.place(number) / MANIFEST).is_file()

    def segment(self, number: int, window_bytes: int) -> ActivationCache:
        """A segment, to read from."""
        return ActivationCache(self.place(number), window_bytes=window_bytes)

    def make_room(self, number: int, keep: Container[int]) -> bool:
        """Whether segment ``number`` fits, after others than those in ``keep`` were removed as far as necessary.

        Segments that were read go first, the oldest first, because a run that is resumed may want the latest again.
        """
        others = [one for one in self.numbers() if one not in keep and one != number]
        while (fits := self._fits(number)) is False and others:
            gone = others[0] if others[0] < number else others[-1]
            others.remove(gone)
            self.remove(gone)
        return fits

    def _fits(self, number: int) -> bool:
        own = used(self.place(number))  # what was written of it before a kill
        return used(self.root) - own + max(self.segment_bytes, own) <= self.limit

    def numbers(self) -> list[int]:
        """The segments of which anything is on disk."""
        folder = self.root / SEGMENTS
        return sorted(int(path.name) for path in folder.iterdir()) if folder.is_dir() else []

    def remove(self, number: int) -> None:
        """Remove a segment; a kill meanwhile leaves no complete one."""
        place = self.place(number)
        discard(Folder(place))
        for path in place.iterdir() if place.is_dir() else ():
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()

    def clear(self) -> None:
        """Remove all segments."""
        for number in self.numbers():
            self.remove(number)
        with contextlib.suppress(OSError):
            (self.root / SEGMENTS).rmdir()

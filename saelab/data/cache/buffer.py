"""Byte ranges of remote files, kept in a bounded file on the local disk so that a later pass need not fetch them."""

from __future__ import annotations

import bisect
import errno
import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from saelab.files import cache_home
from saelab.stores import Store, is_transient

Range = tuple[str, int, int]  # name in the store, first byte, byte after the last
RESERVE = 2 << 30  # bytes of the disk that the buffer leaves to others, checkpoints above all
PIECE = 8 << 20  # bytes of one request: larger ranges are fetched by several at the same time
_log = logging.getLogger(__name__)


class Buffer:
    """What was fetched first stays, until ``limit`` bytes are kept; the rest is fetched whenever it is read.

    Passes over a cache read everything once each. If not all of it fits, keeping what came first saves as much as any
    order of replacement could. The file has no name: it is gone when the process is, however that ends.
    """

    def __init__(self, store: Store, limit: int) -> None:
        self.store, self.limit, self.used = store, limit, 0
        self.fetched = 0  # bytes that came from the store
        self._file: Any = None
        self._kept: dict[str, list[tuple[int, int, int]]] = {}  # name -> (first, end, place in the file), ascending
        self._lock = threading.Lock()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; they are fetched at the same time."""
        with self._lock:
            plans = [list(self._plan(*span)) for span in ranges]
            missing = [(span[0], a, b) for span, plan in zip(ranges, plans) for a, b, place in plan if place is None]
            fetched = iter(self.fetch(missing))
            return [b"".join(self._part(span[0], next(fetched) if p is None else None, a, b, p) for a, b, p in plan)
                    for span, plan in zip(ranges, plans)]  # fmt: skip

    def _plan(self, key: str, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """A range as parts that are kept, with their places, and parts that are not."""
        kept = self._kept.get(key, [])
        for first, end, place in kept[max(bisect.bisect_right(kept, (start, stop, 0)) - 1, 0) :]:
            if first >= stop or start >= stop:
                break
            if end <= start:
                continue
            if start < first:
                yield start, first, None
                start = first
            yield start, min(end, stop), place + start - first
            start = min(end, stop)
        if start < stop:
            yield start, stop, None

    def _part(self, key: str, data: bytes | None, start: int, stop: int, place: int | None) -> bytes:
        if place is not None:
            self._file.seek(place)
            return self._file.read(stop - start)
        assert data is not None
        if self.used + len(data) <= self.limit:
            self._keep(key, data, start, stop)
        return data

    def _keep(self, key: str, data: bytes, start: int, stop: int) -> None:
        if next(self._plan(key, start, stop))[2] is not None:
            return  # asked for twice at once
        try:
            if self._file is None:
                folder = cache_home() / "buffers"
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            if shutil.disk_usage(cache_home()).free < RESERVE:
                raise OSError(errno.ENOSPC, f"the disk has less than {RESERVE / 1e9:.1f} GB left")
            self._file.seek(self.used)
            written = self._file.write(data)
        except OSError as error:  # a full disk: what is kept stays
            _log.warning("the local buffer stays at %.1f GB: %s", self.used / 1e9, error.strerror)
            self.limit = self.used
            return
        if written == len(data):
            bisect.insort(self._kept.setdefault(key, []), (start, stop, self.used))
            self.used += len(data)

    def fetch(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range from the store, many requests at a time; only those that failed are repeated."""
        pieces = [(key, at, min(at + PIECE, b)) for key, a, b in ranges for at in range(a, b, PIECE)]
        found: dict[int, bytes] = {}

        def missing() -> None:
            left = [n for n in range(len(pieces)) if n not in found]
            keys, starts, ends = ([pieces[n][part] for n in left] for part in range(3))
            got = self.store.fs.cat_ranges(keys, starts, ends, on_error="return") if left else []
            failed: list[Exception] = []
            for n, data in zip(left, got, strict=True):
                if isinstance(data, Exception):
                    failed.append(data)
                elif len(data) != pieces[n][2] - pieces[n][1]:
                    failed.append(ConnectionError(f"{len(data)} of {pieces[n][2] - pieces[n][1]} bytes arrived"))
                else:
                    found[n] = data
            for error in sorted(failed, key=is_transient):  # what no repetition can mend comes first
                raise error

        self.store.attempt(missing)
        self.fetched += sum(map(len, found.values()))
        parts = iter(found[n] for n in range(len(pieces)))
        return [b"".join(next(parts) for _ in range(a, b, PIECE)) for _, a, b in ranges]

"""The thread that fills segments while others are read."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from saelab.data.cache import ActivationCache, CacheWriter, Manifest
from saelab.data.packing import Contexts
from saelab.errors import Stopped, UserError
from saelab.harvesting.activations import Reader
from saelab.harvesting.rolling.config import GB, Window
from saelab.harvesting.rolling.disk import Disk, Record, Segment, used
from saelab.harvesting.rolling.passes import Passes, Planned, Spot
from saelab.harvesting.shards import ALONE, fill, kept_roles

POLL = 0.2  # seconds between two looks at whether to stop


class Harvester:
    """Writes one segment after the other from the passes of a text."""

    def __init__(
        self, reader: Reader, manifest: Manifest, window: Window, total: int, disk: Disk, record: Record, save: Any
    ) -> None:
        self.reader, self.window, self.total, self.disk, self.record = reader, window, total, disk, record
        self.keep, self._save = kept_roles(manifest.kept_roles), save
        settings = {**manifest.settings, "shard_passes": window.shard_passes}
        self.manifest = replace(
            manifest, shards=[], mean=[], n_documents=0, roles=[], left_out={}, settings=settings, train_until=None,
            held_out_fraction=0.0, held_out_from=0, rms_norm=0.0, mean_norm=0.0, variance=0.0, scale=1.0,
        )  # fmt: skip

    def plan(self, number: int, passes: Iterator[Contexts]) -> Planned:
        """The passes of a segment; none where enough rows came before it."""
        left = self.total - self.record.first_row(number)
        return Planned(passes, self.window.passes, left, self.keep, self.manifest.skip_first)

    def write(self, number: int, planned: Planned, progress: Callable[[int, int], None]) -> None:
        """Fill a segment, or what a kill has left open of it."""
        manifest = replace(self.manifest, shards=[])
        with closing(CacheWriter(self.disk.folder(number), manifest, resume=True)) as writer:
            fill(self.reader, [writer], iter(planned), planned.total or 0, progress, ALONE)
            writer.finish()

    def note(self, number: int, passes: int, end: Spot | None, verify: bool = False) -> None:
        """Record a complete segment. Raises UserError where one that was read before has other rows now.

        With ``verify`` every byte of it is read, as of a cache with which a run is resumed.
        """
        cache = ActivationCache(self.disk.place(number), verify=verify)
        found, known = Segment(passes, cache.n_rows, cache.fingerprint, end), self.record.segments
        if number == len(known):
            known.append(found)
            self._save()
        elif known[number] != found:
            raise UserError(
                f"segment {number} of {self.disk.root} came out other than before it was removed (rows "
                f"{found.rows}, were {known[number].rows}; fingerprint {found.fingerprint}, was "
                f"{known[number].fingerprint}): model, text or device have changed; start again with --overwrite"
            )


class Producer:
    """Harvests the segments from ``first`` on in a thread, each while the one before it is read.

    Where the model and its reader share their processors (``paced``) the thread makes its forward passes between the
    reader's batches (see :meth:`pace`), so that neither slows the other; else it runs beside the reader.
    """

    def __init__(
        self,
        harvester: Harvester,
        passes: Passes,
        first: int,
        paced: bool,
        stop: Callable[[], bool],
        progress: Callable[[int], None],
    ) -> None:
        self._harvester, self._passes, self._paced, self._stop = harvester, passes, paced, stop
        self._progress, self._changed = progress, threading.Condition()
        self._reading, self._ready, self._working = first, first - 1, first
        self._share, self._done, self._planned = 0.0, 0, Planned(iter(()), 0, 0, harvester.keep, 0)
        self._closed, self._ended, self._error = False, False, None
        self._thread = threading.Thread(target=self._work, args=(first,), name="saelab-rolling", daemon=True)
        self._thread.start()

    def wait(self, number: int) -> bool:
        """Begin to read segment ``number``, once it is on disk; false where the stream has ended before it.

        Raises what went wrong in the thread, and Stopped where the caller asked for it meanwhile.
        """
        with self._changed:
            self._reading, self._share = number, 0.0
            self._changed.notify_all()
            while not (self._ready >= number or self._ended):
                if self._stop():
                    raise Stopped
                self._changed.wait(POLL)
        self._check()
        return self._ready >= number

    def pace(self, share: float) -> None:
        """Let the thread come as far with the next segment as the reader is with its own."""
        self._check()
        if not self._paced:
            return
        with self._changed:
            self._share = share
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._ready > self._reading or self._ended or self._stop() or self._done >= self._allowed(),
                60.0,
            )

    def close(self) -> None:
        """End the thread after the pass that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _allowed(self) -> float:
        """Passes that the thread may make of the segment it is at."""
        if not self._paced or self._working <= self._reading:
            return math.inf
        return math.ceil(self._share * (self._planned.total or self._harvester.window.passes))

    def _work(self, first: int) -> None:
        try:
            spot, skip = self._harvester.record.spot_before(first)
            if spot is not None:
                self._passes.go(spot)
            passes = self._from(skip)
            for number in itertools.count(first):
                if self._harvester.record.first_row(number) >= self._harvester.total:
                    return
                self._segment(number, passes)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _segment(self, number: int, passes: Iterator[Contexts]) -> None:
        disk, known = self._harvester.disk, self._harvester.record.segments
        with self._changed:
            self._until(lambda: self._reading >= number - 1)
            self._working, self._done, self._planned = number, 0, self._harvester.plan(number, passes)
            self._changed.notify_all()
        if disk.complete(number):
            if number < len(known) and (end := known[number].end) is not None:
                self._passes.go(end)
                count = known[number].passes
            else:
                count = sum(1 for _ in self._planned)
            self._harvester.note(number, count, self._passes.spot, verify=True)
        else:
            with self._changed:
                self._until(lambda: self._allowed() > 0)
                # The reader has let go of what came before the segment that it reads now.
                self._until(lambda: self._room(number))
            self._harvester.write(number, self._planned, partial(self._made, number))
            self._harvester.note(number, self._planned.passes, self._passes.spot)
        with self._changed:
            self._ready = number
            self._changed.notify_all()

    def _room(self, number: int) -> bool:
        disk = self._harvester.disk
        if disk.make_room(number, range(self._reading, number + 1)):
            return True
        if self._reading == number:  # nothing is left that could be removed
            raise UserError(
                f"{disk.root} holds {used(disk.root) / GB:.3g} GB of other files, which leaves no room for a segment "
                f"below {disk.limit / GB:g} GB; remove them, or raise --cache-gb"
            )
        return False

    def _from(self, skip: int) -> Iterator[Contexts]:
        for number, batch in enumerate(self._passes):
            if self._closed:
                raise _Closed
            if number >= skip:
                yield batch

    def _made(self, number: int, done: int, total: int) -> None:
        """After each pass: report it, and wait for leave to make the next one."""
        rows = self._planned.rows * (self._done + 1) // self._planned.passes  # a few passes are taken ahead
        self._progress(min(self._harvester.record.first_row(number) + rows, self._harvester.total))
        with self._changed:
            self._done += 1
            self._changed.notify_all()
            if self._done != self._planned.total:
                self._until(lambda: self._allowed() > self._done)

    def _until(self, holds: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._closed or holds())
        if self._closed:
            raise _Closed


class _Closed(Exception):
    """The reader needs no more segments."""

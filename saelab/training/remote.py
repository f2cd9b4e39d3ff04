"""A run folder behind a URL: the run is trained in its local copy, and each checkpoint is carried to the store."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saelab.copies import Copy, place_of
from saelab.distributed.failures import is_first, let_others_go_on, on_one_machine, restarted, wait_for_first
from saelab.errors import UserError
from saelab.files import remove_partial, url_of
from saelab.training.checkpoints import latest_step

LOOK = 1.0  # seconds between two looks for a new checkpoint
_log = logging.getLogger(__name__)
_carriers: dict[Path, Carrier] = {}


class Carrier:
    """Carries each new checkpoint to the store, in a thread; a log of the run, so that it is called at every step.

    If the store gives no answer or refuses, the training goes on, and the next checkpoint is tried. It ends where
    another machine has taken the folder over.
    """

    def __init__(self, copy: Copy) -> None:
        self.copy, self._last = copy, time.monotonic()
        self._carried: Path | None = latest_step(copy.folder)
        self._thread: threading.Thread | None = None

    def write(self, row: dict[str, Any]) -> None:
        """After a step: begin to carry what is new."""
        if self._last + LOOK > time.monotonic():
            return
        self._last = time.monotonic()
        if self.copy.held is not None:
            self.copy.held.check()
        newest = latest_step(self.copy.folder)
        if newest in (None, self._carried) or (self._thread is not None and self._thread.is_alive()):
            return
        self._carried = newest
        self._thread = threading.Thread(target=self._carry, name="saelab-upload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for what is being carried."""
        if self._thread is not None:
            self._thread.join()

    def _carry(self) -> None:
        state = None
        try:
            state = self.copy.snapshot()
            self.copy.push(state)
        except FileNotFoundError:  # a newer checkpoint took its place meanwhile
            self._carried = None
        except (OSError, UserError) as error:
            _log.warning("the checkpoint was not carried to %s: %s; the training goes on", self.copy.url, error)
        finally:
            if state is not None:
                shutil.rmtree(state, ignore_errors=True)


@contextlib.contextmanager
def run_folder(out: Path | str | None, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path | None]:
    """The local folder to train in: ``out`` itself, or the copy of a URL, which is carried there at the end.

    It is also carried where the block ends with an error; an error of the store is then only logged. Raises UserError
    where the URL holds something already, unless it shall be resumed or overwritten, or another machine writes it.
    """
    url = None if out is None else url_of(out)
    if url is None:
        yield None if out is None else Path(out)
        return
    copy = Copy(url)
    with copy.writing():
        folder = copy.pull(empty=True)
        remove_partial(folder.parent, folder.name)  # snapshots of killed processes
        folder.mkdir(parents=True, exist_ok=True)
        if copy.has_files() and not (resume or overwrite):
            raise UserError(f"{url} exists; add --overwrite to replace it, --resume to continue, or name another")
        carrier = _carriers[folder] = Carrier(copy)
        try:
            yield folder
        except BaseException:
            _end(carrier, failed=True)
            raise
        else:
            _end(carrier, failed=False)
        finally:
            _carriers.pop(folder, None)


@contextlib.contextmanager
def shared_folder(out: str, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """:func:`run_folder` of a URL for processes that torchrun started on one machine: the first one fetches the copy,
    in which all of them write, and carries it.

    UserError, before anything is done, where they are on several machines.
    """
    if not on_one_machine():
        raise UserError(
            f"{out} is written in a copy on this machine, and torchrun started processes on several; give a folder "
            "that all of them share"
        )
    if not is_first():
        wait_for_first()
        yield place_of(str(url_of(out)))
        return
    # Processes that are started again go on with what the earlier ones have written.
    with run_folder(out, resume=resume or restarted(), overwrite=overwrite and not restarted()) as folder:
        assert folder is not None
        let_others_go_on()
        yield folder


def _end(carrier: Carrier, failed: bool) -> None:
    carrier.close()
    copy = carrier.copy
    try:
        copy.push()
    except (OSError, UserError) as error:
        if not failed:
            raise
        _log.warning("%s was not brought up to date: %s; the run is in %s", copy.url, error, copy.folder)


def carrier_of(folder: Path | str) -> list[Carrier]:
    """What carries the checkpoints of the run in a local folder, if it is the copy of a URL."""
    found = _carriers.get(Path(folder))
    return [] if found is None else [found]

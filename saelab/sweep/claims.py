"""Claims of the processes that work on one folder: each piece of work belongs to one living process at a time.

A claim is a file that appears atomically, on a network file system too, and that its process touches again and again.
Another process takes the claim over when it has seen no change for ``patience`` seconds *of its own clock*, so clocks
that differ do no harm, or at once where the process is known to be dead, on the same machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch as OtherPatience
from filelock import SoftFileLease, Timeout

from saelab.errors import UserError
from saelab.files import refuse_url

FOLDER = ".workers"  # in the folder that is worked on, while it is
PATIENCE = 120.0  # longer than network file systems keep what they know of a file (60 s for NFS)
SUFFIX = ".claim"
_clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC if hasattr(time, "CLOCK_MONOTONIC") else None)


class Claims:
    """The claims of this process in ``folder``; all processes must have the same ``patience`` (seconds)."""

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        if not patience > 0:
            raise UserError(f"patience={patience:g} must be positive, in seconds")
        refuse_url(folder)  # a store has no leases
        self.folder, self.patience = folder / FOLDER, patience
        self._leases: dict[str, SoftFileLease] = {}
        self._looked = _now()
        self._presence = f"process {os.getpid()} {secrets.token_hex(4)}"  # held from the first claim on

    def take(self, name: str) -> bool:
        """Claim a piece of work; False while another living process has it."""
        return self._take(self._presence) and self._take(name)

    def _take(self, name: str) -> bool:
        if name not in self._leases:
            path = self.folder / f"{_safe(name)}{SUFFIX}"
            self._leases[name] = SoftFileLease(
                path, lease_duration=self.patience, blocking=False, is_singleton=False, thread_local=False
            )
        lease = self._leases[name]
        for _ in range(2):  # the first attempt may only have removed the claim of a dead process
            if lease.is_locked:
                return True
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lease.acquire()
            except (Timeout, FileNotFoundError):  # the last process to leave has just removed the folder
                continue
            except OtherPatience as error:
                raise UserError(
                    f"the processes at work in {self.folder.parent} have another patience than {self.patience:g} s; "
                    "give all of them the same"
                ) from error
        return lease.is_locked

    def give_back(self, name: str) -> None:
        """Let others claim it."""
        self._leases[name].release()

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Wait until the claim is free, and hold it while the block lasts."""
        while not self.take(name):
            time.sleep(0.02)
        try:
            yield
        finally:
            self.give_back(name)

    def lost(self) -> set[str]:
        """The claims that others took over because this process was halted; what they name must not be written."""
        now = _now()
        halted, self._looked = now - self._looked > self.patience / 4, now
        held = {name: lease for name, lease in self._leases.items() if lease.is_locked}
        return {n for n, lease in held.items() if lease.compromise is not None or (halted and not _is_own(lease))}

    def notes(self, name: str, kind: str) -> Path:
        """A file beside the claims, which goes when the last process leaves."""
        return self.folder / f"{_safe(name)}{kind}"

    def others(self) -> bool:
        """Whether another living process is at work here. Claims of dead ones are removed."""
        found = False
        for path in self.folder.glob(f"*{SUFFIX}"):
            name = path.name.removesuffix(SUFFIX).replace("~", "/")
            if name in self._leases and self._leases[name].is_locked:
                continue
            if self.take(name):
                self.give_back(name)
            else:
                found = True
        return found

    def leave(self) -> None:
        """Give everything back; the last process to leave removes the folder."""
        for lease in self._leases.values():
            lease.release()
        if not self.others():
            shutil.rmtree(self.folder, ignore_errors=True)


def _safe(name: str) -> str:
    """A name of a file; names of SAEs have no ``~``."""
    return name.replace("/", "~")


def _now() -> float:
    """Seconds of this machine, those in which it slept included where the system counts them."""
    return time.monotonic() if _clock is None else time.clock_gettime(_clock)


def _is_own(lease: SoftFileLease) -> bool:
    with suppress(OSError, TypeError):
        return str(lease.token) in Path(lease.lock_file).read_text(encoding="utf-8")
    return False

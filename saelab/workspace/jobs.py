"""Long computations of the app, which go on while other pages are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from saelab.errors import UserError, first_line


class Stopped(Exception):
    """The user stopped the job."""


@dataclass
class Job:
    """One computation in a thread of its own: how far it is, and how it ended."""

    name: str
    started: float = field(default_factory=time.monotonic)
    stage: str = "waiting"
    done: int = 0
    total: int = 0
    finished: bool = False
    stopped: bool = False
    error: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def tell(self, stage: str, done: int, total: int) -> None:
        """Note how far it is. Raises Stopped where that was asked for."""
        self.stage, self.done, self.total = stage, done, total
        if self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Ask it to end at the next step that it tells."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set() and not self.finished

    def text(self) -> str:
        """One line: the stage, how far, and since when."""
        spent = int(time.monotonic() - self.started)
        of = f" {self.done:,} of {self.total:,}" if self.total else ""
        return f"{self.stage}{of}, {spent // 60}:{spent % 60:02} min" + (", stopping" if self.stopping else "")


class Jobs:
    """The jobs of a server, at most one of which runs; sessions share it."""

    def __init__(self) -> None:
        self._lock, self._jobs = threading.Lock(), dict[str, Job]()

    def start(self, name: str, work: Callable[[Job], None]) -> Job:
        """Begin ``work`` in a thread. Raises UserError while another job runs, for they share one model."""
        with self._lock:
            if running := self._running():
                raise UserError(f"{running.name} is being computed; wait for it, or stop it")
            self._jobs[name] = job = Job(name)
        threading.Thread(target=_run, args=(job, work), name=name, daemon=True).start()
        return job

    def running(self) -> Job | None:
        """The job that is running."""
        with self._lock:
            return self._running()

    def get(self, name: str) -> Job | None:
        """The last job of this name."""
        with self._lock:
            return self._jobs.get(name)

    def _running(self) -> Job | None:
        return next((job for job in self._jobs.values() if not job.finished), None)


def _run(job: Job, work: Callable[[Job], None]) -> None:
    try:
        work(job)
    except Stopped:
        job.stopped = True
    except (UserError, OSError) as error:
        job.error = str(error)
    except Exception as error:  # a thread's error would be seen by nobody
        job.error = f"{type(error).__name__}: {first_line(error)}"
    finally:
        job.finished = True

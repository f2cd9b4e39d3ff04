"""Object stores behind fsspec URLs: operations that survive a lost connection, and a lock for a folder of objects.

An operation either works, raises FileNotFoundError or FileExistsError, or ends in one line: UserError for what the user
must change (credentials, address, region), OSError where the store gives no answer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.registry import known_implementations

from saelab.errors import UserError, first_line, near_matches
from saelab.files import LOCK

PATIENCE = 300.0  # seconds for which a store that has answered before is asked again
FIRST = 10.0  # the same for one that never answered: its address may be wrong
SILENT = 20.0  # seconds without a byte after which a request is given up and repeated
SHORTEST, LONGEST = 0.5, 30.0  # seconds between two attempts: before the second, and at most
BEAT = 15.0  # seconds between two signs of life of the process that holds a lock
DEAD_AFTER = 4  # beats without a sign of life after which another process takes a lock over
PACKAGES = {"s3": "saelab[s3]", "s3a": "saelab[s3]"}

_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}  # stores without folders
# Errors of lost connections and overloaded servers that are no OSErrors, by the names of their classes.
_LOST = {"HTTPClientError", "ClientConnectionError", "ClientPayloadError", "IncompleteReadError", "IncompleteRead"}
_LOST |= {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ResponseParserError"}
_LOST |= {"ServerTimeoutError", "ServiceRequestError", "ServiceResponseError"}
_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE}
_TRANSIENT = {errno.EBUSY, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT}
_TRANSIENT |= {errno.EHOSTUNREACH, errno.ENETUNREACH, getattr(errno, "EREMOTEIO", errno.EBUSY)}
_log = logging.getLogger(__name__)
_answered: set[str] = set()  # protocol and bucket of stores that have answered this process


class Store:
    """The objects below one URL. Names are relative to it, with ``/``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.protocol, _, self._place = url.partition("://")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, **_options(self.protocol))
        except ImportError as error:
            raise UserError(_missing(url, self.protocol)) from error
        except ValueError as error:
            known = near_matches(self.protocol, ["s3", "gs", "az", *known_implementations])
            raise UserError(f"cannot open {url}: no kind of storage is called {self.protocol}://; {known}") from error
        except Exception as error:
            raise UserError(_refused(url, error)) from error
        self.has_folders = self.protocol not in _OBJECTS

    def key(self, name: str) -> str:
        """The store's own name of an object."""
        return f"{self.root}/{name}" if name else self.root

    @property
    def bucket(self) -> str:
        """The first part of the address: the bucket, container or host."""
        return self._place.partition("/")[0]

    def ask(self, operation: str, *args: Any, **options: Any) -> Any:
        """Call a method of the fsspec file system, again and again with growing pauses while nothing answers."""
        return self.attempt(lambda: getattr(self.fs, operation)(*args, **options))

    def attempt(self, call: Callable[[], Any]) -> Any:
        """:meth:`ask` for any function that talks to the store."""
        known = f"{self.protocol}://{self.bucket}"
        pause, until, told = SHORTEST, None, False
        while True:
            try:
                found = call()
            except (FileNotFoundError, FileExistsError):
                _answered.add(known)
                raise
            except Exception as error:  # each store has its own exceptions, without a common base
                if isinstance(error, OSError) and (error.errno in _LOCAL or error.filename is not None):
                    raise  # of the local disk, which a file is copied to or from
                if not is_transient(error):
                    raise UserError(_refused(self.url, error)) from error
                patience = PATIENCE if known in _answered else FIRST
                until = until or time.monotonic() + patience
                if time.monotonic() + pause > until:
                    text = f"no answer for {patience:.0f} s ({first_line(error)})"
                    raise OSError(errno.ETIMEDOUT, text, self.url) from error
                if not told and patience > FIRST:
                    _log.warning("%s: %s; trying again for %.0f s", self.url, first_line(error), patience)
                    told = True
                time.sleep(pause)
                pause = min(2 * pause, LONGEST)
            else:
                if told:
                    _log.warning("%s answers again", self.url)
                _answered.add(known)
                return found

    def check_bucket(self) -> None:
        """Raise UserError where the bucket does not exist."""
        if self.protocol in _OBJECTS - {"memory"} and not self.ask("exists", self.bucket):
            raise UserError(
                f"{self.url}: there is no bucket {self.bucket}, or these credentials may not see it; check its name, "
                "or make it"
            )

    def objects(self) -> dict[str, tuple[int, str]]:
        """Of every object below, at any depth: its bytes, and a mark that changes with its content."""
        self.fs.invalidate_cache()
        try:
            found = self.ask("find", self.root, detail=True)
        except FileNotFoundError:
            return {}
        start = len(self.root) + 1
        return {str(key)[start:]: (int(e["size"] or 0), mark(e)) for key, e in found.items() if len(key) > start}

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below, at any depth; empty where there is none."""
        return {name: size for name, (size, _) in self.objects().items()}

    def read(self, name: str) -> bytes:
        """A whole object."""
        return self.ask("cat_file", self.key(name))

    def write(self, name: str, data: bytes, **options: Any) -> None:
        """Write a whole object, which appears when it is complete."""
        if self.has_folders:
            self.ask("makedirs", self.key(name).rsplit("/", 1)[0], exist_ok=True)
        try:
            self.ask("pipe_file", self.key(name), data, **options)
        except FileNotFoundError:
            self.check_bucket()
            raise

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.ask("rm_file", self.key(name))


def mark(about: dict[str, Any]) -> str:
    """What of fsspec's description of an object changes when the object is replaced."""
    names = ("size", "ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    return " ".join(str(about[name]) for name in names if about.get(name) is not None)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may work later: a lost connection, a time-out, an overloaded server."""
    if isinstance(error, (ConnectionError, TimeoutError)) or {c.__name__ for c in type(error).__mro__} & _LOST:
        return True
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict) and response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in _OBJECTS - {"memory"}:
        return {}
    # A listing that is kept would hide what other processes write.
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in PACKAGES:  # attempts are counted here
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": SILENT}
    return options


def _missing(url: str, protocol: str) -> str:
    entry = known_implementations.get(protocol, {})
    package = PACKAGES.get(protocol) or str(entry.get("class", protocol)).partition(".")[0]
    if package == "fsspec":
        return f"cannot open {url}: {entry.get('err', 'a package is missing')}"
    return f"cannot open {url}: a package is missing; pip install '{package}'"


def _refused(url: str, error: BaseException) -> str:
    """What a store said, and what to do, in one line."""
    text = first_line(error)
    code = ""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
    if "TimeTooSkewed" in code or "current time is too large" in text:
        remedy = "the clock of this machine is wrong; set it"
    elif "region" in text.lower() or code in ("PermanentRedirect", "301", "IllegalLocationConstraintException"):
        remedy = "set AWS_REGION to the region of the bucket"
    elif isinstance(error, PermissionError) or "credential" in text.lower() or "token" in text.lower():
        remedy = "check the credentials, and what they allow"
    else:
        remedy = "check the address and the credentials"
    return f"{url}: {f'{code}: ' if code and code not in text else ''}{text}; {remedy}"


class Lease:
    """The lock of a folder of objects: one object, whose content its holder changes every ``BEAT`` seconds.

    A process that finds it watches for a change by its own clock, so clocks need not agree, and takes over from a
    holder that shows no sign of life. A holder that was taken for dead finds out at its next write.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.beats, self.lost = store, 0, False
        self.token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="saelab-lease", daemon=True)

    def check(self) -> None:
        """Raise UserError where another process has taken the folder over."""
        if self.lost:
            raise UserError(
                f"another process has taken over {self.store.url}, as this one showed no sign of life for "
                f"{DEAD_AFTER * BEAT:.0f} s; wait for it, or choose another folder"
            )

    def acquire(self) -> None:
        """Take the lock. Raises UserError while a living process holds it."""
        while not self._create():
            before = self._holder()
            if before is None:
                continue
            if not _has_ended(before):
                self._watch(before)
            self.store.remove(LOCK)
        self._thread.start()

    def release(self) -> None:
        """Give it back."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10)
        with contextlib.suppress(OSError, UserError):
            if not self.lost and (self._holder() or {}).get("token") == self.token:
                self.store.remove(LOCK)

    def _watch(self, before: dict[str, Any]) -> None:
        seconds = DEAD_AFTER * BEAT
        who = f"{before.get('host', 'another machine')}, process {before.get('pid', 'unknown')}"
        _log.warning("%s is locked by %s; waiting up to %.0f s for a sign of life", self.store.url, who, seconds)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(BEAT / 2, 5))
            now = self._holder()
            if now is None:
                return
            if now != before:
                raise UserError(
                    f"another process ({who}) is writing {self.store.url}; wait for it, or choose another folder"
                )

    def _content(self) -> bytes:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        return json.dumps({**who, "token": self.token, "beat": self.beats}).encode()

    def _create(self) -> bool:
        """Make the object, unless it exists."""
        try:
            self.store.write(LOCK, self._content(), mode="create")
        except FileExistsError:  # an attempt of which the answer was lost may have made it
            return (self._holder() or {}).get("token") == self.token
        except UserError as error:
            if not isinstance(error.__cause__, (TypeError, ValueError, NotImplementedError)):
                raise
            if self._holder() is not None:  # a store that cannot do this in one step
                return False
            self.store.write(LOCK, self._content())
        try:
            return (self._holder() or {}).get("token") == self.token
        except (OSError, UserError):  # it may be written but not read
            with contextlib.suppress(OSError, UserError):
                self.store.remove(LOCK)
            raise

    def _holder(self) -> dict[str, Any] | None:
        try:
            data = self.store.read(LOCK)
        except FileNotFoundError:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # the work itself reports what is wrong with the store
                if (self._holder() or {}).get("token") != self.token:
                    self.lost = True
                    return
                self.beats += 1
                self.store.write(LOCK, self._content())


@contextlib.contextmanager
def lease(store: Store) -> Iterator[Lease]:
    """Keep other processes from writing the folder while the block lasts."""
    held = Lease(store)
    held.acquire()
    try:
        yield held
    finally:
        held.release()


def _machine() -> str:
    """Where a process number means something: the host since it started, and its name space of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join(parts)


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    pid = holder.get("pid")
    if os.name != "posix" or holder.get("machine") != _machine() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

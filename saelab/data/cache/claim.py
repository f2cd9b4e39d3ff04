"""One process at a time writes a folder: a lock on it, and what to remove of a cache where the writing failed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from saelab.data.cache.manifest import PARTIAL
from saelab.data.cache.storage import Folder
from saelab.errors import UserError
from saelab.layout import MANIFEST, TOKENS

# What network file systems say that have no such lock.
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

_held: dict[str, int] = {}  # folder -> open handle; a writer in the same process takes over from the one before


def hold(folder: Folder) -> None:
    """Claim a local folder for this process, until :func:`release` or its end, even by a kill.

    Raises UserError while another process holds it. Folders behind a URL, and systems and file systems without
    ``flock``, have no lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if folder.local is None:
        return
    release(folder)
    folder.local.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.local, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise UserError(f"another process is writing {folder.url}; wait for it, or choose another folder") from None
        if error.errno in NO_LOCKS:
            return
        raise
    _held[str(folder.local.resolve())] = handle


def release(folder: Folder) -> None:
    """Let others write; does nothing where this process does not hold the folder."""
    if folder.local is not None and (handle := _held.pop(str(folder.local.resolve()), None)) is not None:
        os.close(handle)


@contextlib.contextmanager
def held(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for the time of a block; where this process holds it already, it goes on doing so afterwards."""
    folder = Folder(path)
    if folder.local is not None and str(folder.local.resolve()) in _held:
        yield
        return
    hold(folder)
    try:
        yield
    finally:
        release(folder)


def discard(folder: Folder) -> None:
    """Remove a cache that will not be finished, and its folder if nothing else is in it."""
    release(folder)
    for name in folder.names():
        if name in {MANIFEST, PARTIAL, TOKENS} or name.startswith(("shard_", ".shard_", f".{PARTIAL}")):
            folder.remove(name)
    if folder.local is not None and folder.local.is_dir() and not any(folder.local.iterdir()):
        folder.local.rmdir()

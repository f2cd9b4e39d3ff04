"""One process at a time writes a cache: a lock on its folder, and what to remove where the writing failed."""

from __future__ import annotations

import os

from saelab.data.cache.manifest import MANIFEST, PARTIAL, VOCABULARY
from saelab.data.cache.storage import Folder
from saelab.errors import UserError

_held: dict[str, int] = {}  # folder -> open handle; a writer in the same process takes over from the one before


def hold(folder: Folder) -> None:
    """Claim a local folder for this process, until :func:`release` or its end, even by a kill.

    Raises UserError while another process holds it. Folders behind a URL, and systems without ``flock``, have no lock.
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
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is writing {folder.url}; wait for it, or choose another folder") from None
    _held[str(folder.local.resolve())] = handle


def release(folder: Folder) -> None:
    """Let others write; does nothing where this process does not hold the folder."""
    if folder.local is not None and (handle := _held.pop(str(folder.local.resolve()), None)) is not None:
        os.close(handle)


def discard(folder: Folder) -> None:
    """Remove a cache that will not be finished, and its folder if nothing else is in it."""
    release(folder)
    for name in folder.names():
        if name in {MANIFEST, PARTIAL, VOCABULARY} or name.startswith(("shard_", ".shard_", f".{PARTIAL}")):
            folder.remove(name)
    if folder.local is not None and folder.local.is_dir() and not any(folder.local.iterdir()):
        folder.local.rmdir()

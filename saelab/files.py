"""Write files and folders that appear complete or not at all, even if the process is killed, one process at a time.

What is being written has the name ``.NAME.RANDOM.partial`` beside its place; a killed process leaves it behind, and the
next one that writes there removes it. Tensors go by name and may have any shape, ``[...]``.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from saelab.errors import UserError

LOCK = ".saelab.lock"  # in a folder while it is being written
# What file systems say that have no locks; network file systems may be mounted without them.
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_log = logging.getLogger(__name__)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a crash at any moment, sees the old file or the new one."""
    replace(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in the same way."""
    # safetensors refuses the column-major layout of W_enc.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(path, lambda partial: _save_plain(plain, partial))


def _save_plain(tensors: dict[str, Tensor], path: Path) -> None:
    """``safetensors``' own writer, with an OSError where the system refuses, as from any other writer."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with the name of a new file beside ``path``, and rename that file to ``path``."""
    partial = partial_path(path)
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode  # what the umask leaves; safetensors lets nobody but the owner read its files
    try:
        write(partial)
        partial.chmod(mode)
        sync(partial)  # a system that loses power may otherwise keep the new name and not the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A new name for a file or folder that is to become ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def new_folder(folder: Path, *, overwrite: bool = False, wait: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``folder`` when the block ends, and goes away when the block fails.

    With ``overwrite`` a folder of that name is replaced at the end. Raises UserError where it exists otherwise, and
    while another process writes it, unless told to ``wait`` for that.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder, beside=True, wait=wait):
        if folder.exists() and not overwrite:
            raise UserError(f"{folder} exists; name a new folder")
        remove_partial(folder.parent, folder.name)
        partial, old = partial_path(folder), partial_path(folder)
        partial.mkdir()
        try:
            yield partial
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in a folder, of ``name`` alone where it is given.

    Only the one writer of the folder, or of that name in it, may call this.
    """
    for path in folder.glob(".*.partial" if name is None else f".{glob.escape(name)}.*.partial"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def lock(folder: Path, *, beside: bool = False, wait: bool = False) -> Iterator[None]:
    """Keep other processes, on this and on other hosts, from writing ``folder`` while the block lasts.

    The lock is a file in the folder, which is made if it is missing, and removed again if nothing was written into it;
    or ``beside`` the folder, if it is the folder itself that will be replaced. A process that is killed holds nothing.
    A process may lock a folder again while it holds it, but not ``beside`` it: nobody can go on with a folder that is
    not there yet. Raises UserError while another process holds it, unless told to ``wait``. A file system without
    locks is written all the same, with a warning.
    """
    made = not beside and not folder.exists()
    if made:
        folder.mkdir(parents=True)
    path = (folder.with_name(f".{folder.name}.lock") if beside else folder / LOCK).absolute()
    # A soft lock is a file that a killed process would leave behind, to be removed by hand.
    held = FileLock(path, blocking=wait, is_singleton=not beside, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise UserError(f"another process is writing {folder}; wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _log.warning("%s cannot be locked (%s); take care that no other process writes it", folder, error.strerror)
    try:
        yield
    finally:
        if held.lock_counter <= 1:
            # While it is held: whoever opened it meanwhile sees that it is gone, and makes a new one. Windows, where an
            # open file cannot be removed, removes it on release.
            with contextlib.suppress(OSError):
                path.unlink()
        held.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

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
import math
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

WINDOWS = os.name == "nt"
LOCK = ".saelab.lock"  # in a folder while it is being written
# Errors of file systems without locks; network file systems may be mounted without them.
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
# Kinds of storage behind URLs; one slash is what pathlib leaves of two.
_SCHEMES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory", "http", "https", "ftp"}
_SCHEMES |= {"sftp", "ssh", "smb", "hdfs", "webhdfs"}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,2})(?!/)")
_log = logging.getLogger(__name__)


_protected: set[Path] = set()  # folders in which this process writes nothing


def protect(folder: Path) -> None:
    """From now on writing below ``folder`` raises UserError in this process: for an app that is read only."""
    _protected.add(folder.resolve())


def url_of(path: str | os.PathLike[str]) -> str | None:
    """``path`` as a URL if it is the address of a store, also as pathlib writes it (``s3:/bucket``); else None."""
    text = path.as_posix() if isinstance(path, Path) else str(path)
    found = _ADDRESS.match(text)
    if found is None or found[1] in ("file", "local") or (len(found[2]) == 1 and found[1] not in _SCHEMES):
        return None
    return f"{found[1]}://{text[found.end() :]}".rstrip("/")


def refuse_url(path: Path) -> None:
    """Raise UserError for a URL where a local folder is needed, so that no folder ``s3:`` is made here."""
    if (url := url_of(path)) is not None:
        raise UserError(f"{url} cannot be written by this command; name a folder on this machine")


def _check_writable(path: Path) -> None:
    refuse_url(path)
    where = path.absolute().parent.resolve() / path.name
    if any(where.is_relative_to(folder) for folder in _protected):
        raise UserError(f"{path.name} is not written: this app was started with --read-only")


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a crash at any moment, sees the old file or the new one."""
    replace(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def finite(value: Any) -> Any:
    """What is to be JSON without numbers that are not finite, which become null."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in the same way."""
    # safetensors refuses the column-major layout of W_enc.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(path, lambda partial: _save_plain(plain, partial))


def _save_plain(tensors: dict[str, Tensor], path: Path) -> None:
    """The writer of ``safetensors``, with an OSError where the operating system refuses, as other writers raise."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with the name of a new file beside ``path``, and rename that file to ``path``."""
    _check_writable(path)
    partial = partial_path(path)
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode  # as the umask allows; safetensors makes files that only the owner can read
    try:
        write(partial)
        partial.chmod(mode)
        sync(partial)  # otherwise the new name may survive a loss of power, and the content not
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cache_home() -> Path:
    """Where saelab keeps what can be made again: ``$SAELAB_CACHE``, else ``$XDG_CACHE_HOME/saelab``, else
    ``~/.cache/saelab``. A ``~`` in them is the home directory, also where no shell replaces it (in a service file)."""
    for name, inner in (("SAELAB_CACHE", ""), ("XDG_CACHE_HOME", "saelab")):
        if own := os.environ.get(name):
            try:
                return Path(own).expanduser() / inner
            except RuntimeError as error:
                raise UserError(f"{name}={own} is in the home of no user of this machine; give a full path") from error
    return Path.home() / ".cache" / "saelab"


def partial_path(path: Path) -> Path:
    """A new name for a file or folder that is to become ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def new_folder(folder: Path, *, overwrite: bool = False, wait: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which is renamed to ``folder`` when the block ends and removed if it fails.

    With ``overwrite`` a folder of that name is replaced at the end. Without it, an existing folder raises UserError. So
    does a folder that another process is writing, unless ``wait`` is set.
    """
    _check_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder, beside=True, wait=wait):
        if folder.exists() and not overwrite:
            raise UserError(f"{folder} exists; name a new folder")
        remove_partial(folder.parent, folder.name)
        partial, old = partial_path(folder), partial_path(folder)
        partial.mkdir()
        try:
            yield partial
            try:
                if folder.exists():
                    folder.rename(old)
                partial.rename(folder)
            except BaseException:
                if old.exists() and not folder.exists():
                    old.rename(folder)  # else it would be removed below, with nothing in its place
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path, name: str | None = None) -> None:
    """Remove the partial files that killed processes left in a folder; with ``name``, those of that name only.

    Only the one writer of the folder, or of that name in it, may call this.
    """
    for path in folder.glob(".*.partial" if name is None else f".{glob.escape(name)}.*.partial"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def lock(folder: Path, *, beside: bool = False, wait: bool = False) -> Iterator[None]:
    """Keep other processes, on this and on other hosts, from writing ``folder`` while the block lasts.

    The lock is a file in the folder, or ``beside`` the folder if the folder itself will be replaced. A missing folder
    is made, and removed again if nothing was written into it. A killed process releases its locks. A process may lock a
    folder again while it holds it, but not ``beside`` it. Raises UserError while another process holds the lock, unless
    ``wait`` is set. On a file system without locks a warning is logged and the block runs without one.
    """
    refuse_url(folder)
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
            # Removed while the lock is held, so that a process that has opened the file sees that it is gone and makes
            # a new one. Windows cannot remove an open file and removes it on release.
            with contextlib.suppress(OSError):
                path.unlink()
        held.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if WINDOWS and path.is_dir():
        return  # it opens no folders
    # Windows writes nothing out for a file that is open for reading only.
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

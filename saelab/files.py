"""Write files and folders that appear complete or not at all, even if the process is killed.

Tensors go by name and may have any shape, ``[...]``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the old file or the new one, never half of either."""
    replace(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors atomically."""
    # safetensors refuses the column-major layout of W_enc.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(path, lambda temporary: save_plain(plain, temporary))


def save_plain(tensors: dict[str, Tensor], path: Path) -> None:
    """``safetensors``' own writer, with an OSError where the system refuses, as from any other writer."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, and put it in the place of ``path`` in one rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

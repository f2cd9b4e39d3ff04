"""The file of results: JSON lines, one per trained SAE, that survive an interruption at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab.errors import damaged

NUMBERS = ("batch_size", "d_sae", "n_steps", "k", "lr")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a result file, none if it is missing.

    A last line that an interruption cut off is left out; any other line that is not a result raises UserError.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [_parse(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _parse(line: str, where: str) -> dict[str, Any]:
    with damaged(where, "delete the line to measure that SAE again"):
        row = json.loads(line)
        for name in ("key", "cache", "variant"):
            if not isinstance(row[name], str):
                raise TypeError(f"{name} is {row[name]!r}")
        for name in NUMBERS:
            if not row[name] > 0:
                raise ValueError(f"{name} is {row[name]!r}")
        if row["loss"] is not None and not row["loss"] > 0:
            raise ValueError(f"loss is {row['loss']!r}")
    return row


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line in a single write; a line that an interruption cut off is removed first."""
    line = json.dumps(record) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            kept = os.pread(descriptor, size, 0).rfind(b"\n") + 1
            os.ftruncate(descriptor, kept)
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)

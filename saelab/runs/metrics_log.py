"""``metrics.jsonl``, the log of a training run, read while it may still be growing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saelab.errors import UserError


def read_metrics(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` that may be growing: an unfinished last line is left for the next read.

    ``tail`` reads only about that many bytes from the end.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - tail) if tail else 0
        file.seek(start)
        text = file.read().decode(errors="replace")
    complete = text[: text.rfind("\n") + 1].splitlines()
    if start:
        complete = complete[1:]
    try:
        return [json.loads(line) for line in complete if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} holds a line that is not JSON ({error}); remove it or train again") from error


def thin(rows: list[dict[str, Any]], most: int = 1500) -> list[dict[str, Any]]:
    """At most ``most`` evenly spaced records, the last one always among them: what a curve can show."""
    stride = max(1, -(-len(rows) // most))
    return rows[::-1][::stride][::-1]


def series(rows: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of a log, without the steps that lack ``y``."""
    kept = [row for row in rows if row.get(y) is not None]
    return [row[x] for row in kept], [row[y] for row in kept]


def measured(row: dict[str, Any]) -> set[str]:
    """The names in a record that hold a number."""
    return {name for name, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}

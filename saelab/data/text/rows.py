"""Text in data sets of the ``datasets`` library: saved to disk, or streamed from the hub."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saelab.data.text.fields import TOOLS, choose, texts, without_nulls
from saelab.data.text.source import Pieces, TextSource, counted
from saelab.errors import UserError, first_line


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``Dataset.save_to_disk``."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_saved_dataset(path: Path, split: str) -> Any:
    """A dataset that was saved to disk, or the split of it where it has splits."""
    import datasets

    try:
        data: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # exceptions of arrow, JSON and the library, some without a common base
        raise UserError(f"{path} cannot be read as a saved dataset ({first_line(error)}); save it again") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(map(str, data))}")
        data = data[split]
    return data


def open_saved(path: Path, split: str, column: str | None) -> TextSource:
    """A data set that ``save_to_disk`` wrote."""
    data = load_saved_dataset(path, split)
    remedy = "save it again"
    return counted(str(path), _mark(data._fingerprint, column), lambda out: _rows(data, column, str(path), remedy, out))


def open_hub(source: str, split: str, column: str | None, otherwise: str) -> TextSource:
    """A data set of the hub, ``id`` or ``id:config``, of which ``split`` is streamed; ``otherwise`` says what else
    could be given."""
    import datasets

    name, _, config = source.partition(":")
    try:
        data: Any = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # of the library, of its HTTP client and of the operating system
        raise UserError(f"cannot load the dataset {source!r} ({first_line(error)}); {otherwise}") from error
    what = f"{source} {split} {data.info.version} {data.info.dataset_size} {data.info.download_checksums}"
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    remedy = "check the connection and run the command again with --resume"
    return counted(source, _mark(digest, column), lambda out: _rows(data, column, source, remedy, out))


def _mark(fingerprint: str, column: str | None) -> str:
    """The fingerprint of one column."""
    if column is None:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {column}".encode()).hexdigest()[:16]


def _rows(data: Any, column: str | None, where: str, remedy: str, left_out: Counter[str]) -> Pieces:
    if data.features:  # a stream may not know its columns
        kinds = {name: {_kind(feature)} for name, feature in data.features.items()}
        column = choose(kinds, column, where)
        names = [column, TOOLS] if "chat" in kinds[column] and TOOLS in kinds else [column]
        # Other columns may hold images, which would be decoded.
        data = data.select_columns(names)
    for document in texts(_records(data, where, remedy), column, where, left_out):
        yield True, document


def _records(data: Any, where: str, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for number, record in enumerate(data, 1):
            tools = {TOOLS: without_nulls(record[TOOLS])} if TOOLS in record else {}
            yield f"record {number} of {where}", record | tools
    except UserError:
        raise
    except Exception as error:  # as above: the connection, the server, or a damaged file of the data set
        raise UserError(f"{where} broke off after {number:,} records ({first_line(error)}); {remedy}") from error


def _kind(feature: Any) -> str:
    if isinstance(feature, dict):
        inner: Any = feature
    else:
        kind = getattr(feature, "dtype", None)
        if kind in ("string", "large_string", "string_view"):
            return "text"
        if kind == "null":
            return "nothing"
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    names = set(inner) if isinstance(inner, dict) else set()
    return "chat" if {"role", "content"} <= names or {"from", "value"} <= names else "other"

"""Text in local files: plain text, JSON lines and Parquet, also compressed, alone or in folders."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from saelab.data.text.fields import TOOLS, choose, found, texts, without_nulls
from saelab.data.text.source import Pieces, TextSource, counted
from saelab.errors import UserError, damaged, first_line

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE = 1 << 18  # characters of a plain-text file read at a time


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
KINDS = f"{', '.join(SUFFIXES)}, the first two also compressed ({', '.join(COMPRESSED)})"


def kind(path: Path) -> str | None:
    """Which of ``SUFFIXES`` a file is, by its name and whatever compression the name says; None for other files."""
    names = [suffix.lower() for suffix in path.suffixes[-2:]]
    if names and names[-1] in COMPRESSED:
        return names[0] if len(names) == 2 and names[0] in {".txt", ".jsonl"} else None
    return names[-1] if names and names[-1] in SUFFIXES else None


def open_files(name: str, files: list[Path], column: str | None, others: Counter[str] | None = None) -> TextSource:
    """The documents of files, in the given order; ``others`` is what was left out already, by reason."""
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
    for file in files:
        if kind(file) is None:
            raise UserError(f"cannot read {file}: text comes as {KINDS}; convert it")

    def read(left_out: Counter[str]) -> Pieces:
        left_out.update(others or {})
        for file in files:
            if file.stat().st_size == 0:
                left_out["empty files"] += 1
            else:
                yield from readers[kind(file) or ""](file, column, left_out)

    digest = digest_of(files)
    if column is not None:  # another column is another text
        digest = hashlib.sha256(f"{digest} {column}".encode()).hexdigest()[:16]
    return counted(name, digest, read)


def open_folder(path: Path, column: str | None) -> TextSource:
    """All text files below a folder, in the order of their names; other files are counted."""
    files, others = [], Counter()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            others["hidden files"] += 1  # such as the ._notes.txt that macOS writes beside notes.txt
        elif kind(file) is None:
            others[f"files of another kind ({file.suffix or 'no ending'})"] += 1
        else:
            files.append(file)
    if not files:
        raise UserError(f"{path} holds no {KINDS}; name a folder that does")
    return open_files(str(path), files, column, others)


def digest_of(files: list[Path]) -> str:
    """A hash of the content of files, whatever their names."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[IO[str]]:
    """A file opened as text, without the mark that some editors put at the start of UTF-8."""
    import pyarrow

    opener = COMPRESSED.get(path.suffix.lower())
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(opener(path) if opener else path.open("rb"))
            yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8-sig"))  # pyright: ignore[reportArgumentType]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); compress the file again") from error
    except OSError as error:
        if opener is None or error.errno is not None:  # a fault of the disk
            raise
        raise UserError(f"{path} is damaged ({first_line(error)}); compress the file again") from error


def _txt(path: Path, column: str | None, left_out: Counter[str]) -> Pieces:
    starts = True
    with _utf8(path) as file:
        # Pieces end at line ends: a tokenizer sees no word cut in two.
        while chunk := file.read(PIECE):
            yield starts, chunk + file.readline()
            starts = False
    if starts:
        left_out["empty files"] += 1


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a ``.jsonl``, each with its place (``path:line``); empty lines are skipped."""
    with _utf8(path) as file:
        # A file's own lines: a string in JSON may hold other characters that end lines elsewhere.
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number} is not valid JSON ({first_line(error)}); correct or remove the line"
                ) from error
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number} is not a JSON object; correct or remove the line")
            yield f"{path}:{number}", record


def _jsonl(path: Path, column: str | None, left_out: Counter[str]) -> Pieces:
    for document in texts(json_lines(path), column, str(path), left_out):
        yield True, document


def _parquet(path: Path, column: str | None, left_out: Counter[str]) -> Pieces:
    import pyarrow
    import pyarrow.parquet

    # Arrow reports damage as an invalid value, or as an OSError.
    sound = damaged(path, "give a sound Parquet file", pyarrow.ArrowException, OSError)
    with sound, pyarrow.parquet.ParquetFile(path) as table:
        kinds = {f.name: {_arrow_kind(f.type)} for f in table.schema_arrow}
        name = choose(kinds, column, str(path))
        names = [name, TOOLS] if "chat" in kinds[name] and TOOLS in kinds else [name]
        for batch in table.iter_batches(batch_size=256, columns=names):
            lists = batch.column(TOOLS).to_pylist() if len(names) > 1 else [None] * len(batch)
            for value, tools in zip(batch.column(name).to_pylist(), lists):
                for document in found(value, name, without_nulls(tools), left_out):
                    yield True, document


def _arrow_kind(kind: Any) -> str:
    import pyarrow.types as types

    if types.is_dictionary(kind):  # how categories are stored
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_null(kind):
        return "nothing"
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
        names = {kind.field(i).name for i in range(kind.num_fields)} if types.is_struct(kind) else set()
        return "chat" if {"role", "content"} <= names or {"from", "value"} <= names else "other"
    return "other"

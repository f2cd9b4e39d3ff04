"""Sources of text: the embedded Wikipedia sample, local files, and ``datasets`` datasets.

A source yields *pieces* ``(starts a document, text)``: long plain-text files come in several pieces, so that no file
has to fit in memory.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from saelab.errors import UserError, damaged, first_line

WIKI_SAMPLE = "wiki-sample"
SUFFIXES = (".txt", ".jsonl", ".parquet")
_PIECE = 1 << 18  # characters of a plain-text file read at a time
Pieces = Iterator[tuple[bool, str]]


@dataclass(frozen=True)
class TextSource:
    """Documents, their name, and a fingerprint that changes when they do."""

    name: str
    fingerprint: str
    pieces: Callable[[], Pieces]

    def documents(self) -> Iterator[str]:
        """Whole documents."""
        parts: list[str] = []
        for starts, text in self.pieces():
            if starts and parts:
                yield "".join(parts)
                parts = []
            parts.append(text)
        if parts:
            yield "".join(parts)


def open_text(source: str | Path, *, split: str = "train", column: str | None = None) -> TextSource:
    """Open a text source by name.

    ``source`` is ``wiki-sample``; a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file; a folder of such files,
    or one written by ``Dataset.save_to_disk``; or the hub id of a dataset, ``id`` or ``id:config``, of which ``split``
    is streamed. ``column`` names the field with the text (default ``text``, else the only text field). Raises
    UserError, with the remedy, if there is no such source.
    """
    if str(source) == WIKI_SAMPLE:
        return _wiki_sample()
    path = Path(source).expanduser()
    if path.is_file():
        return _files(str(path), [path], column)
    if path.is_dir():
        if is_saved_dataset(path):
            data = load_saved_dataset(path, split)
            return TextSource(str(path), data._fingerprint, lambda: _rows(data, column, str(path)))
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no {', '.join(SUFFIXES)} files; name a folder that does")
        return _files(str(path), files, column)
    if path.is_absolute() or path.suffix in SUFFIXES or str(source).startswith((".", "~")):
        raise UserError(f"text {source} does not exist; give {WIKI_SAMPLE}, a file or folder that does, or a hub id")
    return _hub_dataset(str(source), split, column)


def from_documents(documents: list[str], name: str = "memory") -> TextSource:
    """Documents that are already in memory."""
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]
    return TextSource(name, digest, lambda: ((True, text) for text in documents))


def _wiki_sample() -> TextSource:
    spec = importlib.util.find_spec("gensim")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [f for d in folders for f in Path(d, "test", "test_data").glob("enwiki-latest-pages-articles1.xml*.bz2")]
    if not found:
        raise UserError("wiki-sample comes with gensim, which is not installed; pip install 'saelab[demo]'")
    return TextSource(WIKI_SAMPLE, _digest(found[:1]), functools.partial(_wiki_pieces, found[0]))


def _wiki_pieces(path: Path) -> Pieces:
    from gensim.corpora import wikicorpus

    extract_pages: Any = wikicorpus.extract_pages
    with bz2.open(path, "rb") as file:
        for title, markup, _ in extract_pages(file, filter_namespaces=("0",)):
            if markup.lstrip().upper().startswith("#REDIRECT"):
                continue
            text = re.sub("'{2,}", "", wikicorpus.filter_wiki(markup))  # bold and italics, which gensim leaves
            text = re.sub(r"[ \t\xa0]*\n\s*\n\s*", "\n\n", text).strip()  # holes where tables and images were
            if text:
                yield True, f"{title}\n\n{text}"


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _files(name: str, files: list[Path], column: str | None) -> TextSource:
    unreadable = [file for file in files if file.suffix not in SUFFIXES]
    if unreadable:
        raise UserError(f"cannot read {unreadable[0]}: text comes as {', '.join(SUFFIXES)}; convert it")
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}

    def pieces() -> Pieces:
        for file in files:
            yield from readers[file.suffix](file, column)

    return TextSource(name, _digest(files), pieces)


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[IO[str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _txt(path: Path, column: str | None) -> Pieces:
    starts = True
    with _utf8(path) as file:
        # Pieces end at line ends: a tokenizer sees no word cut in two.
        while chunk := file.read(_PIECE):
            yield starts, chunk + file.readline()
            starts = False


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


def _jsonl(path: Path, column: str | None) -> Pieces:
    for where, record in json_lines(path):
        yield True, _field(record, column, where)


def _parquet(path: Path, column: str | None) -> Pieces:
    import pyarrow
    import pyarrow.parquet

    # Arrow reports damage as an invalid value, or as an OSError.
    sound = damaged(path, "give a sound Parquet file", pyarrow.ArrowException, OSError)
    with sound, pyarrow.parquet.ParquetFile(path) as table:
        texts = [f.name for f in table.schema_arrow if f.type in (pyarrow.string(), pyarrow.large_string())]
        name = _column(texts, column, str(path))
        for batch in table.iter_batches(batch_size=256, columns=[name]):
            yield from ((True, text) for text in batch.column(0).to_pylist() if text)


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


def _hub_dataset(source: str, split: str, column: str | None) -> TextSource:
    import datasets

    name, _, config = source.partition(":")
    try:
        data: Any = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the dataset {source!r} ({first_line(error)}); "
            f"give {WIKI_SAMPLE}, a local file or folder, or a hub id"
        ) from error
    what = f"{source} {split} {data.info.version} {data.info.dataset_size} {data.info.download_checksums}"
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    return TextSource(source, digest, lambda: _rows(data, column, source))


def _rows(data: Any, column: str | None, where: str) -> Pieces:
    return ((True, text) for record in data if (text := _field(record, column, where)))


def _field(record: dict[str, Any], column: str | None, where: str) -> str:
    name = _column([key for key, value in record.items() if isinstance(value, str)], column, where)
    return record[name]


def _column(texts: list[str], column: str | None, where: str) -> str:
    """The field that holds the text."""
    if column is not None:
        if column not in texts:
            raise UserError(f"{where} has no text field {column!r}; it has {', '.join(texts) or 'none'}")
        return column
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise UserError(f"{where} has no field 'text'; name one of {', '.join(texts) or 'none'} as the text column")


def storable(text: str) -> str:
    """``text`` in a form that a file can hold: halves of characters, as some vocabularies give, become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

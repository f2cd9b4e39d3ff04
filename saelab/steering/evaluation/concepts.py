"""Concepts to steer towards and instructions to steer on: the sets that come with saelab, and files of one's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saelab.errors import UserError, damaged, near_matches

_FOLDER = Path(__file__).parent
_WORD = re.compile(r"[^\W\d_]{3,}")
MOST_WORDS = 12


@dataclass(frozen=True)
class Concept:
    """Something that a text can be about.

    ``positive`` texts are about it, ``negative`` ones are not; pairs at the same place differ in little else. ``words``
    name it: their probability is what steering should raise.
    """

    name: str
    words: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("a concept has no name; give every concept a name")
        if not self.words and not self.positive:
            raise UserError(f"the concept {self.name!r} has neither words nor texts; give it words or contrast texts")
        if bool(self.positive) != bool(self.negative):
            raise UserError(f"the concept {self.name!r} has texts of one sort only; give positive and negative ones")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Its words; without any, those that most positive texts and no negative ones have, at most twelve."""
        if self.words:
            return self.words
        positive, negative = (Counter(w for text in texts for w in {*_WORD.findall(text.lower())})
                              for texts in (self.positive, self.negative))  # fmt: skip
        own = [word for word, _ in positive.most_common() if word not in negative]
        if not own:
            raise UserError(f"every word of the concept {self.name!r}'s texts is in its contrast texts; give it words")
        return tuple(own[:MOST_WORDS])

    def halves(self) -> tuple[Concept, Concept]:
        """Two concepts of every other pair of texts: one to make directions from, the other to judge with.

        Raises UserError with less than two texts of each sort, of which no half can be held out.
        """
        if min(len(self.positive), len(self.negative)) < 2:
            raise UserError(
                f"the concept {self.name!r} has {len(self.positive)} positive and {len(self.negative)} negative texts; "
                "evaluation needs two of each, so that the texts that make directions are not those that judge"
            )
        return self._part(0), self._part(1)

    def _part(self, start: int) -> Concept:
        return Concept(self.name, self.vocabulary, self.positive[start::2], self.negative[start::2])


def shipped_concepts() -> list[Concept]:
    """Thirty concepts, each with eight words and ten pairs of sentences."""
    return read_concepts(_FOLDER / "concepts.json")


def shipped_instructions() -> list[str]:
    """Fifty short everyday requests; none names a shipped concept."""
    return read_instructions(_FOLDER / "instructions.txt")


def read_concepts(path: Path | str) -> list[Concept]:
    """Concepts from a JSON file: a list of objects with ``name``, ``positive``, ``negative`` and ``words``."""
    path = Path(path)
    with damaged(path, 'give a JSON list of objects {"name", "positive", "negative", "words"}', OSError):
        rows = json.loads(path.read_bytes())
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("it holds no list of objects")
        found = [_concept(row, path) for row in rows]
    names = Counter(concept.name for concept in found)
    if not found or max(names.values()) > 1:
        twice = f"the concept {names.most_common(1)[0][0]!r} twice" if found else "no concept"
        raise UserError(f"{path} holds {twice}; give each concept once")
    return found


def _concept(row: dict, path: Path) -> Concept:
    if unknown := sorted(set(row) - {"name", "words", "positive", "negative"}):
        raise UserError(f"{path}: a concept has the field {unknown[0]!r}; fields are name, words, positive, negative")
    called = row.get("name", "")
    if not isinstance(called, str):
        raise UserError(f"{path}: the name of a concept is {called!r}, which is no text; write it in quotes")
    lists = {}
    for name in ("words", "positive", "negative"):
        value = row.get(name, [])
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise UserError(f"{path}: {name} of the concept {called!r} is not a list of texts")
        lists[name] = tuple(value)
    return Concept(called, **lists)


def read_instructions(path: Path | str) -> list[str]:
    """Instructions from a text file: one per line, empty lines and lines that begin with # left out."""
    path = Path(path)
    with damaged(path, "give a text file with one instruction per line", OSError):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise UserError(f"{path} holds no instruction; write one per line")
    return found


def pick_concepts(names: Sequence[str], known: Sequence[Concept]) -> list[Concept]:
    """The concepts of these names, all of them where no name is given."""
    by_name = {concept.name: concept for concept in known}
    for name in names:
        if name not in by_name:
            raise UserError(f"no concept {name!r}: {near_matches(name, by_name)}")
    return [by_name[name] for name in names] or list(known)


def find_concept(text: str, known: Sequence[Concept] | None = None) -> Concept:
    """The concept called ``text``, with or without "the"; otherwise one of the words in it, separated by commas."""
    wanted = text.strip().lower()
    for concept in shipped_concepts() if known is None else known:
        if wanted in (concept.name.lower(), concept.name.lower().removeprefix("the ")):
            return concept
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UserError('the concept is empty; give a name or words, as in --concept "sea, ocean"')
    return Concept(text.strip(), words)

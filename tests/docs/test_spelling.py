"""Prose is in British English: pages, the changelog, notebooks, docstrings and messages.

Code, literals, addresses and the names that other packages gave are left out.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# American stem -> British one; any ending may follow the stem.
STEMS = {
    "analyz": "analys",
    "artifact": "artefact",
    "behavior": "behaviour",
    "cancel(?=ed|ing)": "cancell",
    "catalog(?!u)": "catalogue",
    "center": "centre",
    "color": "colour",
    "defense": "defence",
    "favor": "favour",
    "fiber": "fibre",
    "gray": "grey",
    "harbor": "harbour",
    "honor": "honour",
    "judgment": "judgement",
    "label(?=ed|ing)": "labell",
    "model(?=ed|ing)": "modell",
    "neighbor": "neighbour",
    "skeptic": "sceptic",
    "toward(?!s)": "towards",
    "travel(?=ed|ing)": "travell",
}
AMERICAN = re.compile(
    rf"\b(?:un|re|pre)?(?:{'|'.join(STEMS)})\w*|\b\w{{3,}}iz(?:e|es|ed|ing|able|ation|ations|er|ers)\b", re.I
)
# Words that end so in British English too, and two nouns for which the field has one spelling.
BRITISH = {
    "size",
    "sizes",
    "sized",
    "resize",
    "resizes",
    "resized",
    "resizing",
    "oversized",
    "seize",
    "prize",
    "prizes",
}
FIELD = {"tokenizer", "tokenizers", "optimizer", "optimizers", "detokenizer"}
# Code, addresses, HTML, CSS and what stands in quotation marks.
NOT_PROSE = re.compile(
    r"```.*?```|^(?: {4}|\t)\S.*?$|``.*?``|`[^`]*`|^\.\. .*?$|https?://\S+|\]\([^)]*\)|<[^>\n]+>|\bcolor:|: center;"
    r"|\"[^\"\n]*\"|“[^”]*”",
    flags=re.S | re.M,
)


def american(text: str) -> list[str]:
    """The words of a text that are spelt in the American way."""
    found = (match.group() for match in AMERICAN.finditer(NOT_PROSE.sub(" ", text)))
    return [word for word in found if word.lower() not in BRITISH | FIELD and not re.search(r"[_\d]|.[A-Z]", word)]


def sentences(path: Path) -> Iterator[str]:
    """The docstrings of a file, and the messages in it: strings of four words or more."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) >= 4:
            yield node.value


def prose() -> Iterator[tuple[str, str]]:
    """Every text with the name of its file."""
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob(".github/**/*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "checkpoints/README.md",
    ]
    for page in sorted(pages):
        if not {"_generated", "_build", "tutorials"} & set(page.relative_to(ROOT).parts):
            yield str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    for notebook in sorted(ROOT.glob("notebooks/*.ipynb")):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield notebook.name, "".join(cell["source"])
    for folder in ("saelab", "app", "docs", "notebooks", "checkpoints"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for text in sentences(path):
                yield str(path.relative_to(ROOT)), text


def test_prose_is_in_british_english() -> None:
    texts = list(prose())
    assert len(texts) > 1000
    assert sorted({f"{name}: {word}" for name, text in texts for word in american(text)}) == []


@pytest.mark.parametrize("word", ["normalized", "Neighbors", "color", "optimizing", "toward", "labeled", "recenter"])
def test_american_words_are_found(word: str) -> None:
    assert american(f"a {word} thing") == [word]


@pytest.mark.parametrize(
    "text",
    ["the tokenizer of batch size 8", "`normalize=True`", "call ``x.color``", "towards", "[a](color.md)", '"labeled"'],
)
def test_code_names_and_the_fields_words_are_left_alone(text: str) -> None:
    assert american(text) == []

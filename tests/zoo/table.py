"""The table of docs/models.md: what saelab reads in which family. ``python -m tests.zoo.table`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from saelab.errors import UserError
from saelab.lm import locate
from saelab.lm.sites import replaceable
from tests.zoo.families import FAMILIES, places

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
UNKNOWN_TO_TRANSFORMER_LENS = {"biogpt", "persimmon", "helium", "diffllama", "doge", "minimax", "phi3.5-moe"}


def render() -> str:
    """The table and its footnotes, from what :func:`saelab.lm.locate` says of block 1 of each family."""
    points = list(places())
    notes: dict[str, str] = {}
    lines = [
        "| Family | " + " | ".join(f"`{point}`" for point in points) + " |",
        "|---|" + "---|" * len(points),
    ]
    for name, family in FAMILIES.items():
        model = family.build()
        cells = [_cell(model, point, notes) for point in points]
        mark = " \\*" if name in UNKNOWN_TO_TRANSFORMER_LENS else ""
        lines.append(f"| {name} (`{family.model}`){mark} | " + " | ".join(cells) + " |")
    footnotes = [f"- **{letter}**: {reason}" for reason, letter in notes.items()]
    return "\n".join([*lines, "", "Refused, in one line:", "", *footnotes])


def _cell(model: object, point: str, notes: dict[str, str]) -> str:
    name = f"blocks.1.{point}"
    try:
        site = locate(model, name)  # type: ignore[arg-type]
    except UserError as error:
        reason = str(error).removeprefix(f"{name}: ")
        reason = re.sub(r", only .*; use", "; use", reason)  # the names of the modules differ
        reason = re.sub(r"\S+\.(\S+_proj) gives", r"`\1` gives", reason)
        return notes.setdefault(reason, "abcdefghij"[len(notes)])
    return "yes" if replaceable(site) else "read"


def written() -> str:
    """What the page has between its two marks."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{render()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")

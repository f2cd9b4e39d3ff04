"""``saelab inspect``: what a checkpoint of any tool is, and what is odd about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab.cli.common import out, parse, print_json
from saelab.interop import inspect


@dataclasses.dataclass(frozen=True)
class Options:
    """What to look at."""

    path: tyro.conf.Positional[Path]
    """File or folder of an SAE, whichever tool wrote it."""
    json: bool = False
    """Print one JSON document."""


def main(args: Sequence[str]) -> None:
    """Print the facts, oddities last."""
    options = parse(Options, "inspect", args, "Say what an SAE checkpoint is: format, shapes, norms, hook, oddities.")
    facts = inspect(options.path)
    if options.json:
        print_json(facts)
        return
    for name, value in facts.items():
        if name == "notes":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_short(entry)}" for key, entry in value.items()) or "-"
        out.print(f"{name:<22} {_short(value)}", markup=False)
    for note in facts["notes"]:
        out.print(f"note: {note}", markup=False)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

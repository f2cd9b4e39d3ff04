"""Reading saved ledgers: a line per claim, curves. ``python -m saelab.reproduce.results`` prints the table."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saelab.errors import UserError
from saelab.reproduce import PAPERS

DIFFERENCE = re.compile(r"difference(s?\.|$|_of_\d)")  # of the compared, not the "difference of means" of two classes


def read_ledgers(folder: Path | str) -> list[dict[str, Any]]:
    """The ledgers of a folder, in the order of ``PAPERS``."""
    paths = [Path(folder) / f"{name}.json" for name in PAPERS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{folder} holds no ledger; run `saelab reproduce all --cache CACHE --out {folder}`")
    return found


def claims(ledgers: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One line per claim: paper, claim, whether on planted or real activations, the number that decides, verdict."""
    return [
        {
            "paper": ledger["paper"],
            "claim": row["claim"],
            "activations": "planted" if row["synthetic"] else "real",
            "measured": headline(row["measured"], row["shows"]),
            "verdict": row["verdict"],
        }
        for ledger in ledgers
        for row in ledger["rows"]
    ]


def headline(measured: dict[str, Any], shows: str = "") -> str:
    """The number that decides a claim as text: the one at the dotted path ``shows``, or the first difference."""
    found = dict(_summaries(measured))
    if not found:
        return ""
    name = shows or next((name for name in found if DIFFERENCE.search(name)), next(iter(found)))
    if isinstance(found[name], float):
        return f"{name.replace('_', ' ')} {found[name]:.3g}"
    mean, low, high = (found[name][key] for key in ("mean", "low", "high"))
    text = f"{name.replace('_', ' ').replace('.', ' ')} {mean:+.3g}"
    if low is None or high is None:  # what is compared differs too much in L0 for an interval to mean something
        own, other = found[name]["l0"]
        return f"{text} at L0 {own:.3g} and {other:.3g}"
    return f"{text} ({low:+.3g} to {high:+.3g})"


def _summaries(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, float):
            yield prefix + name, value
        elif isinstance(value, dict):
            if {"mean", "low", "high"} <= value.keys():
                yield prefix + name, value
            else:
                yield from _summaries(value, f"{prefix}{name}.")


def curves(ledger: dict[str, Any], metric: str) -> dict[str, list[tuple[float, float, str]]]:
    """Mean over seeds of ``metric`` against L0 for every SAE of a ledger, as :func:`saelab.viz.pareto` takes it."""
    out: dict[str, list[tuple[float, float, str]]] = {}
    for row in ledger["rows"]:
        for point in row["measured"].get("table", []):
            if metric in point:
                text = f"{point['label']}<br>{metric} {point[metric]:.4f}, sd over seeds {point[f'{metric}_sd']:.4f}"
                known = out.setdefault(point["label"], [])
                if (entry := (point["l0"], point[metric], text)) not in known:
                    known.append(entry)
    return out


def markdown(ledgers: Sequence[dict[str, Any]]) -> str:
    """The claims as a Markdown table."""
    lines = ["| paper | claim | activations | measured | verdict |", "| --- | --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in claims(ledgers)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown(read_ledgers(sys.argv[1] if len(sys.argv) > 1 else "notebooks/results")))

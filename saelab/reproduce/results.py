"""Reading saved ledgers: a line per claim, curves. ``python -m saelab.reproduce.results`` prints the table.

With ``--details`` it prints every number behind a verdict instead: means with their intervals, at each budget.
"""

from __future__ import annotations

import argparse
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
    """One line per claim: paper, claim, whether on planted or real activations (of the second model: its name), the
    number that decides, verdict."""
    return [
        {
            "paper": ledger["paper"],
            "claim": row["claim"],
            "activations": "planted" if row["synthetic"] else f"real{elsewhere(ledger, row)}",
            "measured": headline(row["measured"], row["shows"]),
            "verdict": row["verdict"],
        }
        for ledger in ledgers
        for row in ledger["rows"]
    ]


def elsewhere(ledger: dict[str, Any], row: dict[str, Any]) -> str:
    """ ", MODEL" where a row is of the second model, else nothing: its numbers stand beside no other's."""
    data = ledger.get("data") or {}
    places = [(place["model"], place["hook_name"]) for place in (data, data.get("second")) if place]
    found = [place for place in places if row["setting"].startswith(" ".join(place))]
    return f", {found[0][0]}" if found and found[0] != places[0] else ""


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
    if low is None or high is None:  # of one document, or what is compared differs too much in L0
        if found[name].get("documents") == 1:
            return f"{text} on one document"
        own, other = found[name].get("l0_apart", found[name]["l0"])
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
    """Mean over seeds of ``metric`` against L0 for every SAE of a ledger, as :func:`saelab.viz.pareto` takes it.

    SAEs of the second model have curves of their own, with its name.
    """
    out: dict[str, list[tuple[float, float, str]]] = {}
    for row in ledger["rows"]:
        for point in row["measured"].get("table", []):
            if metric in point:
                text = f"{point['label']}<br>{metric} {point[metric]:.4f}, sd over seeds {point[f'{metric}_sd']:.4f}"
                known = out.setdefault(point["label"] + elsewhere(ledger, row), [])
                if (entry := (point["l0"], point[metric], text)) not in known:
                    known.append(entry)
    return out


def markdown(ledgers: Sequence[dict[str, Any]]) -> str:
    """The claims as a Markdown table; a verdict names the budgets at which it is another."""
    lines = ["| paper | claim | activations | measured | verdict |", "| --- | --- | --- | --- | --- |"]
    rows = [row for ledger in ledgers for row in ledger["rows"]]
    for line, row in zip(claims(ledgers), rows, strict=True):
        lines.append("| " + " | ".join([*line.values()]) + _elsewhere(row) + " |")
    return "\n".join(lines) + "\n"


def _elsewhere(row: dict[str, Any]) -> str:
    found = row["measured"].get("verdicts", {})
    curves = found if any(isinstance(value, dict) for value in found.values()) else {"": found}
    others: dict[str, list[str]] = {}
    for baseline, verdicts in curves.items():
        against = f" against {baseline}" if len(curves) > 1 else ""
        for budget, verdict in verdicts.items():
            if verdict != row["verdict"]:
                others.setdefault(verdict + against, []).append(budget)
    said = "; ".join(f"{verdict} at k {', '.join(budgets)}" for verdict, budgets in others.items())
    return f" ({said})" if said else ""


def details(ledgers: Sequence[dict[str, Any]]) -> str:
    """Every number behind the verdicts, a line each: its path, mean and interval, or the plain number."""
    lines = []
    for ledger in ledgers:
        for row in ledger["rows"]:
            lines.append(f"{ledger['paper']}: {row['claim']}: {row['verdict']}{_elsewhere(row)}")
            lines += [f"    {name:<60} {_number(value)}" for name, value in _summaries(row["measured"])]
    return "\n".join(lines) + "\n"


def _number(value: float | dict[str, Any]) -> str:
    if not isinstance(value, dict):
        return f"{value:.4g}"
    interval = "" if value["low"] is None else f" ({value['low']:+.4g} to {value['high']:+.4g})"
    return f"{value['mean']:+.4g}{interval}"


def main(args: Sequence[str] | None = None) -> None:
    """Print the table, or the details."""
    parser = argparse.ArgumentParser(prog="python -m saelab.reproduce.results", description=__doc__)
    parser.add_argument("folder", nargs="?", default="notebooks/results", help="folder with the ledgers")
    parser.add_argument("--details", action="store_true", help="every number behind the verdicts")
    options = parser.parse_args(args)
    ledgers = read_ledgers(options.folder)
    sys.stdout.write(details(ledgers) if options.details else markdown(ledgers))


if __name__ == "__main__":
    main()

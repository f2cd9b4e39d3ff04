"""An evaluation of steering as a figure, and as one HTML page that is readable offline."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from saelab.viz.axes import base
from saelab.viz.escape import label as safe
from saelab.viz.theme import LIGHT, Palette

NOTE = (
    "Scores go from 0 to 2, means over concepts on the test instructions. A line joins a method's strengths, the "
    "mildest first; the hollow point is the unsteered model."
)


def concept_against_fluency(result: Mapping[str, Any], colours: Palette = LIGHT, height: int = 380) -> go.Figure:
    """One line per method over its strengths: how far the concept comes through, and what is left of the fluency."""
    figure = base(colours, height, "concept, 0 to 2", "fluency, 0 to 2")
    for method, points in result.get("curves", {}).items():
        known = [p for p in points if p["concept"] is not None and p["fluency"] is not None]
        texts = [
            f"{safe(method)}, strength {int(p['level']) + 1} of {len(points)}<br>concept {p['concept']:.2f}, "
            f"instruction {p['instruction']:.2f}, fluency {p['fluency']:.2f}<br>overall {p['overall']:.2f}"
            for p in known
        ]
        figure.add_scatter(
            x=[p["concept"] for p in known],
            y=[p["fluency"] for p in known],
            text=texts,
            name=safe(method),
            mode="markers" if method == "none" else "lines+markers",
            marker={"size": 9, "symbol": "circle-open" if method == "none" else "circle"},
            line={"width": 2},
            hovertemplate="%{text}<extra></extra>",
        )
    return figure.update_xaxes(range=[-0.05, 2.05]).update_yaxes(range=[-0.05, 2.05])


def mean_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per method: the scores with their intervals."""
    rows = []
    for row in result.get("means", []):
        shown = {"method": row["method"]}
        shown |= {name: interval(row[name]) for name in ("concept", "instruction", "fluency", "overall", "surprise")}
        rows.append(shown)
    return rows


def difference_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per comparison that counts: the overall score, and the concept at equal damage."""
    names = {"overall": "overall", "concept at equal damage": "concept at equal damage"}
    return [
        {
            "method": d["method"],
            "against": d["reference"],
            "score": names[d["score"]],
            "difference": interval(d),
            "verdict": d["verdict"],
        }
        for d in result.get("differences", [])
        if d["score"] in names
    ]


def interval(found: Mapping[str, Any]) -> str:
    """``0.42 (0.31 to 0.53)``; a dash for what is not known."""
    if found["mean"] is None:
        return "–"
    if found["low"] is None or found["high"] is None:
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    found = [] if result.get("complete") else [f"Not finished: {result['answers']} of {result['of']} answers."]
    by = result["scored_by"]
    found.append("Scores are offline proxies, not a judge's ratings." if by == "proxies" else f"Judged by {by}.")
    found += [f"Cannot tell {score}: {why}." for score, why in result.get("cannot_tell", {}).items()]
    if result.get("judge_stopped"):
        found.append(f"The judge stopped: {result['judge_stopped']}.")
    if result.get("unreadable"):
        found.append(f"{result['unreadable']} answers have a rating that could not be read; they are left out.")
    short = [(name, key) for key, methods in result.get("calibration", {}).items() for name, row in methods.items()
             if not all(level["reached"] for level in row["levels"])]  # fmt: skip
    if short:
        found.append(f"{len(short)} calibrations did not reach their budget, of {short[0][0]} for {short[0][1]} first.")
    differences = len(result.get("differences", []))
    if differences:
        found.append(f"Of {differences} intervals, {differences / 20:.2g} would exclude zero by chance alone.")
    return found


def report_page(result: Mapping[str, Any], title: str = "steering evaluation") -> str:
    """Remarks, figure, tables and examples as one HTML page."""
    figure = concept_against_fluency(result).to_html(full_html=False, include_plotlyjs=True)
    parts = [f"<p>{html.escape(line)}</p>" for line in remarks(result)]
    parts += [figure, f"<p>{html.escape(NOTE)}</p>", "<h2>Scores</h2>", _table(mean_rows(result))]
    parts += ["<h2>Differences</h2>", _table(difference_rows(result)), "<h2>Examples</h2>"]
    columns = ("concept_name", "method", "instruction_text", "text", "concept", "instruction", "fluency")
    parts.append(_table([{name: _short(e[name]) for name in columns} for e in result.get("examples", [])]))
    style = (
        "body{font-family:sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;"
        "font-size:.9rem}td,th{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

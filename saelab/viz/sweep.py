"""The report of a sweep: one self-contained HTML file, readable offline."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from saelab.lm.hook_names import any_layer, layer_of
from saelab.sweep.caches import places_of, trained_apart
from saelab.sweep.guidance import guidance, points_of
from saelab.viz.axes import base, log_axis
from saelab.viz.charts import by_layer, pareto
from saelab.viz.escape import label as safe
from saelab.viz.theme import LIGHT, Palette
from saelab.workspace.numbers import depth_series

AXES = {
    "fvu": "FVU on held-out tokens (lower is better)",
    "dead_fraction": "dead latents, share of the dictionary",
    "ce_loss_recovered_zero": "CE loss recovered (against zero ablation)",
}
COSTS = {"cpu_seconds": "processor seconds of training", "parameters": "parameters"}
SUMMARY = "Means over seeds, with 95 % intervals over seeds and held-out documents"
DIFFERENCES = "Differences of FVU on the same seeds and documents (a minus b), with 95 % intervals"
RATES = "Learning rates tried, on validation tokens; the star is the one chosen"
WHICH_L0 = "Which number of active latents? Where the directions of the dictionary overlap least (arXiv 2508.16560)"
WIDTHS = "Hedging: what narrower SAEs hold of features that only wider ones have latents for (arXiv 2505.11756)"
SUMMARY_COLUMNS = (
    *("name", "seeds", "documents", "l0", "fvu", "fvu_low", "fvu_high", "dead_fraction", "ce_loss_recovered_zero"),
    *("shared_latents", "shared_by_chance", "cpu_seconds", "parameters"),
)
DIFFERENCE_COLUMNS = ("a", "b", "difference", "low", "high", "verdict", "seeds", "documents")
COLUMNS = ("name", "status", "step", "l0", "fvu", "dead_fraction", "ce_loss_recovered_zero", "lr", "seed", "message")


def pareto_of(rows: Sequence[Mapping[str, Any]], value: str, colours: Palette = LIGHT) -> go.Figure:
    """L0 against one measured column of a sweep's table, one series per variant, width and place.

    Rows without the column are left out.
    """
    points: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    several = len({row["d_sae"] for row in rows}) > 1
    for row, place in zip(rows, places_of(rows)):
        if row["l0"] is not None and row[value] is not None:
            text = f"{safe(row['name'])}<br>L0 {row['l0']:.1f}<br>{value} {row[value]:.4f}"
            series = f"{row['variant']} {row['d_sae']}" if several else row["variant"]
            points[series + place].append((row["l0"], row[value], text))
    return pareto(points, colours, "L0 on held-out tokens", AXES[value])


def depth_of(rows: Sequence[Mapping[str, Any]], value: str, colours: Palette = LIGHT) -> go.Figure | None:
    """One measured column against the layer, a series for SAEs that differ in nothing else.

    Those of a single layer are left out; None where nothing remains.
    """
    points: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for row, training in zip(rows, trained_apart(rows)):
        hook = row.get("hook_name_out") or row.get("hook_name") or ""
        layer = layer_of(hook)
        if layer is not None and row[value] is not None:
            text = f"{safe(row['name'])}<br>L0 {row['l0']:.1f}<br>{value} {row[value]:.4f}"
            series = depth_series(row["variant"], row["d_sae"], row["asked_l0"], f"{training} {any_layer(hook)}")
            points[series].append((layer, row[value], text))
    points = {series: own for series, own in points.items() if len({row[0] for row in own}) > 1}
    return by_layer(points, colours, AXES[value]) if points else None


def cost_of(rows: Sequence[Mapping[str, Any]], column: str, colours: Palette = LIGHT) -> go.Figure | None:
    """FVU against ``cpu_seconds`` or ``parameters``, a series per variant and place; None where no SAE has both."""
    points: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for row, place in zip(rows, places_of(rows)):
        if row["fvu"] is not None and row.get(column) is not None:
            cost = f"{COSTS[column]} {row[column]:.4g}"
            text = f"{safe(row['name'])}<br>{cost}<br>FVU {row['fvu']:.4f}, L0 {row['l0']:.1f}"
            points[row["variant"] + place].append((row[column], row["fvu"], text))
    return pareto(points, colours, COSTS[column], AXES["fvu"]) if points else None


def rates_of(rows: Sequence[Mapping[str, Any]], colours: Palette = LIGHT, height: int = 320) -> go.Figure | None:
    """Learning rate against FVU on validation rows, one series per tuned SAE, the chosen rate as a star.

    None where no rate was tuned. Rates that were stopped early or diverged have no FVU; :func:`lost_rates` lists them.
    """
    leads = _leads(rows)
    if not leads:
        return None
    figure = base(colours, height, "learning rate", "FVU on validation tokens", showlegend=len(leads) > 1)
    shown: list[float] = []
    for row in leads:
        trials = json.loads(row["tried"])
        measured = [trial for trial in trials if trial["fvu"] is not None]
        shown += [trial["lr"] for trial in measured]
        figure.add_scatter(
            x=[trial["lr"] for trial in measured],
            y=[trial["fvu"] for trial in measured],
            text=[
                f"{safe(row['name'])}<br>lr {t['lr']:.3g}<br>FVU {t['fvu']:.4f}, L0 {t['l0']:.1f}"
                + ("<br>chosen" if t["lr"] == row["lr"] else "")
                for t in measured
            ],
            name=safe(row["name"]),
            mode="lines+markers",
            marker={
                "size": [14 if trial["lr"] == row["lr"] else 8 for trial in measured],
                "symbol": ["star" if trial["lr"] == row["lr"] else "circle" for trial in measured],
            },
            line={"width": 1, "dash": "dot"},
            hovertemplate="%{text}<extra></extra>",
        )
    return figure.update_xaxes(log_axis(shown)) if shown else figure


def lost_rates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each tuned SAE one line with the rates that did not reach the end, and the step at which they were lost."""
    lines = []
    for row in _leads(rows):
        lost = [trial for trial in json.loads(row["tried"]) if trial["status"] != "finished"]
        words = {"halted": "stopped", "diverged": "diverged"}
        parts = [f"{t['lr']:.3g} {words[t['status']]} at step {t['step']}" for t in lost]
        if parts:
            lines.append(f"{row['name']}: {', '.join(parts)}")
    return lines


def _leads(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row for each choice of a rate: seeds share what was tried."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row.get("tried"):
            first.setdefault(row["tried"], row)
    return list(first.values())


def chance(differences: Sequence[Mapping[str, Any]]) -> str:
    """What many intervals of 95 % mean together; of differences that have none nothing is said."""
    count = sum(row["low"] is not None for row in differences)
    if not count:
        return "None of them has an interval."
    return f"Of {count} such intervals, {count / 20:.2g} would exclude zero by chance alone if nothing differed."


def report(
    rows: Sequence[Mapping[str, Any]],
    title: str = "sweep",
    summaries: Sequence[Mapping[str, Any]] = (),
    differences: Sequence[Mapping[str, Any]] = (),
    widths: Sequence[str] = (),
) -> str:
    """The charts that have data, then the tables, as one HTML page."""
    shown = [value for value in AXES if any(row[value] is not None for row in rows)]
    parts = []
    for number, value in enumerate(shown):
        figure = pareto_of(rows, value).to_html(full_html=False, include_plotlyjs=number == 0)
        parts.append(f"<h2>{html.escape(AXES[value])}</h2>{figure}")
        if (figure := depth_of(rows, value)) is not None:
            page = figure.to_html(full_html=False, include_plotlyjs=False)
            parts.append(f"<h2>Quality by depth: {html.escape(AXES[value])}</h2>{page}")
    rates = rates_of(rows)
    if rates is not None:
        page = rates.to_html(full_html=False, include_plotlyjs=not shown)
        parts.append(f"<h2>{html.escape(RATES)}</h2>{page}")
        parts += [f"<p>{html.escape(line)}</p>" for line in lost_rates(rows)]
    for column in COSTS:
        if (figure := cost_of(rows, column)) is not None:
            page = figure.to_html(full_html=False, include_plotlyjs=not shown and rates is None)
            parts.append(f"<h2>{html.escape(AXES['fvu'])}, {html.escape(COSTS[column])}</h2>{page}")
    if advice := guidance(points_of(rows)):
        parts.append(f"<h2>{html.escape(WHICH_L0)}</h2>")
        for one in advice:
            curve = ", ".join(f"{l0:.3g}: {overlap:.4f}" for l0, overlap in one.curve)
            parts.append(f"<p>{html.escape(one.sentence)}. L0 and c_dec: {html.escape(curve)}</p>")
    if widths:
        parts.append(f"<h2>{html.escape(WIDTHS)}</h2>")
        parts += [f"<p>{html.escape(line)}</p>" for line in widths]
    if summaries:
        parts.append(f"<h2>{html.escape(SUMMARY)}</h2>{_table(summaries, SUMMARY_COLUMNS)}")
    if differences:
        parts.append(f"<h2>{html.escape(DIFFERENCES)}</h2>{_table(differences, DIFFERENCE_COLUMNS)}")
        parts.append(f"<p>{html.escape(chance(differences))}</p>")
    style = (
        "body{font-family:sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-size:.9rem}td,th{padding:.25rem .6rem;text-align:left;"
        "border-bottom:1px solid #ddd}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}"
        f"<h2>All SAEs</h2>{_table(rows, COLUMNS)}</body></html>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td>{html.escape(text)}</td>"

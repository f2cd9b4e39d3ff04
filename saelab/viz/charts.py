"""Plotly figures from plain arrays. Every function takes the palette last and returns a finished figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from saelab.viz.axes import base, log_axis, round_ticks, written
from saelab.viz.escape import label as safe
from saelab.viz.legend import looks
from saelab.viz.theme import SYMBOLS, Palette

NEAR = 0.05  # of the x axis: SAEs that differ by less are of one number of active latents
DEAD_LOG_DENSITY = -10.0  # where a latent that never fired stands on a log10 density axis


class _Point(NamedTuple):
    """One SAE of :func:`pareto`."""

    x: float
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    held_out: bool = True


def pareto(
    points: Mapping[str, Sequence[tuple[Any, ...]]], colours: Palette, x: str = "L0", y: str = "FVU"
) -> go.Figure:
    """Sparsity against fidelity, one series per variant: ``{variant: [(l0, value, hover text, ...), ...]}``.

    The hover text is taken as HTML already (escape names with ``viz.label``). Further fields of a point are the ends of
    the value's interval, which is drawn as a bar, and whether it was measured on held-out rows: where it was not, the
    symbol is hollow and no line leads to it. Points within 5 % of each other on the x axis, as of several seeds, are
    joined to the others by their mean.
    """
    fig = base(colours, 320 + 20 * -(-len(points) // 3), x, y)  # the legend has about three names a row
    for i, (name, rows) in enumerate(points.items()):
        series = sorted((_Point(*row) for row in rows), key=lambda point: point[:2])
        look = SYMBOLS[i % len(SYMBOLS)], colours.series[i % len(colours.series)]
        measured, others = ([p for p in series if p.held_out == side] for side in (True, False))
        if measured:
            _points(fig, measured, name, *look, colours.background)
        if others:
            _points(fig, others, f"{name}, training rows", f"{look[0]}-open", look[1], "")
    return fig.update_xaxes(log_axis([row[0] for rows in points.values() for row in rows]))


def _points(fig: go.Figure, rows: Sequence[_Point], name: str, symbol: str, colour: str, edge: str) -> None:
    """One series of :func:`pareto`; ``edge`` is the colour around filled symbols, empty for hollow ones."""
    above = [0.0 if row.high is None else row.high - row.value for row in rows]
    below = [0.0 if row.low is None else row.value - row.low for row in rows]
    means = _means_of_near(rows)
    line = {"width": 1, "dash": "dot", "color": colour}
    if edge and 1 < len(means) < len(rows):
        x, y = zip(*means)
        along: Any = {"mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False, "legendgroup": name}
        fig.add_scatter(x=x, y=y, name=safe(name), **along)
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.5, "width": 4}
    fig.add_scatter(
        x=[row.x for row in rows],
        y=[row.value for row in rows],
        text=[row.text for row in rows],
        name=safe(name),
        mode="lines+markers" if edge and len(means) == len(rows) else "markers",
        legendgroup=name,
        marker={
            "size": 11,
            "symbol": symbol,
            "color": colour,
            "line": {"width": 1 if edge else 2, "color": edge or colour},
        },
        line=line,
        hovertemplate="%{text}<extra></extra>",
        error_y=bars if any(above) or any(below) else None,
    )


def _means_of_near(rows: Sequence[_Point]) -> list[tuple[float, float]]:
    """The mean of each run of points, sorted by x, that lie within ``NEAR`` of the first of them."""
    groups: list[list[_Point]] = []
    for row in rows:
        if groups and abs(row.x - groups[-1][0].x) <= NEAR * abs(groups[-1][0].x):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [(fmean(row.x for row in group), fmean(row.value for row in group)) for group in groups]


def by_layer(points: Mapping[str, Sequence[tuple[Any, ...]]], colours: Palette, y: str = "FVU") -> go.Figure:
    """A number against the layer, one series per kind of SAE: ``{kind: [(layer, value, hover lines), ...]}``."""
    layers = sorted({int(row[0]) for rows in points.values() for row in rows})
    shown = layers[:: -(-len(layers) // 16)]
    return pareto(points, colours, "layer", y).update_xaxes(
        type="linear", tickvals=shown, ticktext=list(map(str, shown))
    )


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colours: Palette,
    x: str = "",
    y: str = "",
    log_y: bool = False,
    height: int = 240,
    legend: bool = True,
) -> go.Figure:
    """Curves ``{name: (x, y)}``; dashes tell them apart besides colour, see :func:`~saelab.viz.legend.looks`.

    Without ``legend`` the page has one for all its charts.
    """
    fig = base(colours, height, x, y, hovermode="x unified", showlegend=legend and len(series) > 1)
    known = looks(list(series), colours)
    for name, (xs, ys) in series.items():
        line = {"width": 2, "color": known[name].colour, "dash": known[name].dash}
        fig.add_scatter(x=list(xs), y=list(ys), name=safe(name), mode="lines", line=line)
    fig.update_xaxes(tickformat="~s")
    values = [y for _, ys in series.values() for y in ys]
    if log_y:
        return fig.update_yaxes(log_axis(values))
    # Nothing but zeros would be drawn on an axis of small fractions.
    return fig.update_yaxes(rangemode="tozero") if any(values) else fig.update_yaxes(range=[0, 1], tickvals=[0, 1])


def density_histogram(
    densities: Mapping[str, np.ndarray], colours: Palette, floor: float = DEAD_LOG_DENSITY, height: int = 280
) -> go.Figure:
    """Share of latents by log10 of their firing density; latents that never fired stand at ``floor``."""
    fig = base(colours, height, "log₁₀ of the share of tokens a latent fires on", "share of latents", barmode="overlay")
    edges = np.arange(floor - 0.125, 0.2, 0.25)
    for name, density in densities.items():
        density = np.asarray(density, dtype=float)
        logs = np.where(density > 0, np.log10(np.maximum(density, 10.0**floor)), floor)
        counts, _ = np.histogram(logs, edges)
        fig.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts / max(1, counts.sum()),
            customdata=counts,
            name=safe(name),
            opacity=1.0 if len(densities) == 1 else 0.6,
            hovertemplate="10^%{x:.2f}: %{customdata} latents (%{y:.2%})<extra>" + safe(name) + "</extra>",
        )
    fig.add_annotation(
        x=floor, y=1, yref="paper", yanchor="top", text="dead", showarrow=False, font_color=colours.muted
    )
    return fig.update_yaxes(tickformat=".0%")


def activation_histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    colours: Palette,
    pole: int = 1,
    quantiles: Mapping[str, float] | None = None,
) -> go.Figure:
    """Magnitudes of a latent's activations where it fires. Bins are drawn equally wide, whatever ``edges`` are.

    Counts stand on a log axis, because the tail is what a latent means. ``quantiles`` are magnitudes.
    """
    bounds, at = np.asarray(edges, dtype=float), np.arange(len(counts)) + 0.5
    texts = [f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(bounds)]
    tint = colours.positive if pole > 0 else colours.negative
    fig = base(colours, 200, "magnitude of the activation, raw units", "tokens", showlegend=False)
    hover = "%{text}: %{y:,} tokens<extra></extra>"
    fig.add_bar(x=at, y=list(counts), text=texts, textposition="none", marker_color=tint, hovertemplate=hover)
    for name, value in (quantiles or {}).items():
        x = float(np.interp(value, bounds, np.arange(len(bounds))))
        fig.add_vline(x=x, line={"color": colours.text, "width": 1, "dash": "dot"})
        label = {"size": 11, "color": colours.muted}
        fig.add_annotation(x=x, y=1, yref="paper", yanchor="bottom", text=name, showarrow=False, font=label)
    fig.update_layout(margin_t=22)
    ticks = round_ticks(bounds[bounds > 0][0], bounds[-1]) if bounds.size and bounds[-1] > 0 else []
    places = np.interp(ticks, bounds, np.arange(len(bounds))).tolist() if ticks else []
    fig.update_xaxes(tickvals=places, ticktext=[written(tick) for tick in ticks], showgrid=False)
    fig.update_xaxes(range=[0, len(counts)])
    return fig.update_yaxes(_counts_axis(counts))


def _counts_axis(counts: Sequence[int]) -> dict[str, Any]:
    """A log axis for bars of counts, on which a single one still has some height."""
    most = max([10, *counts])
    ticks = [10.0**e for e in range(int(np.log10(most)) + 1)]
    ends = [np.log10(0.7), np.log10(1.2 * most)]
    return {"type": "log", "range": ends, "tickvals": ticks, "ticktext": [written(tick) for tick in ticks]}


def logit_effects(
    promoted: Sequence[tuple[str, float]], suppressed: Sequence[tuple[str, float]], colours: Palette
) -> go.Figure:
    """Tokens a direction promotes and suppresses: bars to the right and to the left."""
    rows = [*promoted, *reversed(suppressed)]
    values = [v for _, v in rows]
    fig = base(colours, 40 + 21 * max(1, len(rows)), "logit per unit of activation", showlegend=False)
    fig.add_bar(
        x=values,
        y=list(range(len(rows))),
        orientation="h",
        marker={"color": [colours.positive if v >= 0 else colours.negative for v in values]},
        hovertemplate="%{x:+.3f}<extra></extra>",
    )
    labels = [safe(token) or "∅" for token, _ in rows]
    return fig.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, autorange="reversed", showgrid=False)


def logit_histogram(effects: np.ndarray, colours: Palette, bins: int = 120) -> go.Figure:
    """How a direction moves the logits of the whole vocabulary; counts stand on a log axis, for the tails matter."""
    counts, edges = np.histogram(np.asarray(effects, dtype=float), bins)
    middle = (edges[:-1] + edges[1:]) / 2
    fig = base(colours, 200, "logit per unit of activation, less the mean", "tokens", showlegend=False)
    fig.add_bar(
        x=middle,
        y=counts,
        width=np.diff(edges),
        marker_color=[colours.positive if x >= 0 else colours.negative for x in middle],
        hovertemplate="%{x:+.3f}: %{y:,} tokens<extra></extra>",
    )
    return fig.update_yaxes(_counts_axis(counts.tolist()))


def firing_rank(
    ranked: Mapping[str, np.ndarray], colours: Palette, fits: Mapping[str, tuple[float, float]] | None = None
) -> go.Figure:
    """Firing densities by rank on two log axes, with the law ``exp(c) * rank^-s`` where fitted: ``(c, s)``."""
    fig = base(colours, 320, "rank", "share of tokens it fires on")
    for i, (name, counts) in enumerate(ranked.items()):
        counts = np.sort(np.asarray(counts, dtype=float))[::-1]
        counts = counts[counts > 0]
        keep = np.unique(np.geomspace(1, max(1, len(counts)), 200).astype(int)) - 1 if len(counts) else []
        rank = np.asarray(keep, dtype=float) + 1
        colour = colours.series[i % len(colours.series)]
        fig.add_scatter(x=rank, y=counts[keep], name=safe(name), mode="lines", line={"width": 2, "color": colour})
        if fits and name in fits and len(rank):
            log_scale, exponent = fits[name]
            line = {"width": 1.5, "dash": "dash", "color": colour}
            label = f"{safe(name)}: Zipf s = {exponent:.2f}"
            fig.add_scatter(x=rank, y=np.exp(log_scale) * rank**-exponent, name=label, mode="lines", line=line)
    fig.update_xaxes(log_axis([1, *(len(counts) for counts in ranked.values())], 6))
    drawn = [value for counts in ranked.values() for value in np.asarray(counts, dtype=float).tolist()]
    return fig.update_yaxes(log_axis(drawn))


def scatter(
    x: Sequence[float],
    y: Sequence[float],
    labels: Sequence[str],
    colours: Palette,
    x_title: str = "",
    y_title: str = "",
) -> go.Figure:
    """Labelled points; labels are corpus or user text and are escaped."""
    fig = base(colours, 320, x_title, y_title, showlegend=False)
    texts = [safe(label) for label in labels]
    fig.add_scatter(x=list(x), y=list(y), mode="markers", text=texts, hovertemplate="%{text}<extra></extra>")
    return fig


def dose_response(
    strengths: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    colours: Palette,
    y: str,
    chosen: float | None = None,
    band: tuple[Sequence[float], Sequence[float], str] | None = None,
) -> go.Figure:
    """What each direction does as its strength grows; the chosen strength is marked.

    ``band`` is the lower and the upper end of an interval at each strength, and its name.
    """
    fig = lines(
        {name: (strengths, ys) for name, ys in curves.items()}, colours, "length added, raw units", y, height=320
    )
    fig.update_traces(mode="lines+markers")
    if band is not None:
        low, high, name = band
        fig.add_scatter(
            x=[*strengths, *reversed(strengths)],
            y=[*high, *reversed(low)],
            fill="toself",
            mode="lines",
            line={"width": 0},
            fillcolor=colours.muted,
            opacity=0.25,
            hoverinfo="skip",
            name=safe(name),
        )
    if chosen is not None:
        # Inside the axes: the legend is above them.
        mark = {
            "text": " on this page",
            "showarrow": False,
            "yref": "paper",
            "y": 1.0,
            "yanchor": "top",
            "xanchor": "left",
        }
        fig.add_vline(x=chosen, line={"color": colours.muted, "dash": "dot"})
        fig.add_annotation(x=chosen, font={"color": colours.muted, "size": 11}, **mark)
    return fig

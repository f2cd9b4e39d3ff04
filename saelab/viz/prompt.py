"""Figures of a text seen through an SAE: which latents are active, and why they were selected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from saelab.viz.axes import base, shortened, token_axis
from saelab.viz.escape import label as safe
from saelab.viz.theme import Palette

ROW = 24  # characters of a row's name beside a map


def steps(values: Sequence[float], selected: int, colours: Palette, x: str = "", y: str = "") -> go.Figure:
    """A curve over steps with one step marked: the matching-pursuit replay."""
    fig = base(colours, 240, x, y, showlegend=False)
    fig.add_scatter(x=list(range(len(values))), y=list(values), mode="lines+markers", line={"width": 2})
    marker = {"size": 14, "color": colours.positive, "line": {"width": 2, "color": colours.text}}
    fig.add_scatter(x=[selected], y=[values[selected]], mode="markers", marker=marker)
    return fig


def heatmap(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: Palette,
    unit: str = "activation",
    first: int = 0,
) -> go.Figure:
    """Signed values on the diverging scale, zero at the page's background; on half of it where none is negative.

    The scale is that of the columns from ``first`` on; what exceeds it before them has the full colour. Names of rows
    and columns are shortened beside the map and whole where a cell is pointed at.
    """
    counted = values[:, first:] if np.size(values) and first < values.shape[1] else values
    end = float(np.abs(counted).max()) or 1.0 if np.size(counted) else 1.0
    signed = bool(np.size(values)) and float(np.min(values)) < 0
    scale = [[0.0, colours.background], [1.0, colours.positive]]
    if signed:
        scale = [[0.0, colours.negative], [0.5, colours.background], [1.0, colours.positive]]
    ticks = [safe(shortened(row, ROW)) for row in rows]
    at = [[f"{safe(row)}<br>{safe(column)}" for column in columns] for row in rows]
    fig = base(colours, 140 + 22 * len(rows))
    bar = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right", "len": 0.5, "thickness": 10}
    fig.add_heatmap(
        z=values,
        x=[str(i) for i in range(len(columns))],
        zmin=-end if signed else 0.0,
        zmax=end,
        colorscale=scale,
        customdata=at,
        hovertemplate="%{customdata}<br>%{z:+.3f}<extra></extra>",
        # Above the map: beside it, it would take a quarter of a narrow page.
        colorbar={"title": {"text": unit, "side": "top"}, "outlinewidth": 0, "nticks": 5, **bar},
        xgap=1,
        ygap=1,
    )
    fig.update_xaxes(**token_axis(columns), showgrid=False, zeroline=False).update_yaxes(zeroline=False)
    return fig.update_yaxes(tickvals=list(range(len(rows))), ticktext=ticks, autorange="reversed", showgrid=False)


def contest_bars(
    labels: Sequence[str],
    scores: Sequence[float],
    won: Sequence[bool],
    colours: Palette,
    cut: float | Sequence[float] | None = None,
    x: str = "score",
    notes: Sequence[str] | None = None,
    gap: tuple[int, str] | None = None,
) -> go.Figure:
    """Scores of the latents that competed for a token, winners filled, with the cut.

    ``cut`` is one number, or one per bar. ``notes`` say more of each bar when it is pointed at. ``gap`` is how many
    bars stand before those that were left out, and what to write there.
    """
    fig = base(colours, 60 + 19 * max(1, len(scores) + bool(gap)), x, showlegend=False, bargap=0.3)
    at = [i + bool(gap and i >= gap[0]) for i in range(len(scores))]
    if gap:
        fig.add_annotation(x=0, y=gap[0], xanchor="left", text=safe(gap[1]), showarrow=False, font_color=colours.muted)
    fill = [colours.primary if w else "rgba(0,0,0,0)" for w in won]
    marker = {"color": fill, "line": {"width": 1.5, "color": colours.primary}}
    texts = [f"{safe(label)} {safe(note)}" for label, note in zip(labels, notes or [""] * len(at))]
    hover = "%{customdata}<br>%{x:.4f}<extra></extra>"
    fig.add_bar(x=list(scores), y=at, orientation="h", marker=marker, customdata=texts, hovertemplate=hover)
    if isinstance(cut, Sequence):
        mark = {"symbol": "line-ns", "size": 11, "line": {"width": 2, "color": colours.text}}
        hover = "its threshold: %{x:.4f}<extra></extra>"
        fig.add_scatter(x=list(cut), y=at, mode="markers", marker=mark, hovertemplate=hover)
    elif cut is not None:
        fig.add_vline(x=cut, line={"color": colours.text, "width": 1.5, "dash": "dot"})
    ticks = [safe(label) for label in labels]
    ends = [len(at) + bool(gap) - 0.4, -0.6]
    return fig.update_yaxes(tickvals=at, ticktext=ticks, range=ends, showgrid=False, zeroline=False)

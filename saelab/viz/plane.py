"""Many points in the plane, each of which can be clicked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from saelab.viz.axes import base
from saelab.viz.escape import label as safe
from saelab.viz.theme import Palette

Points = Mapping[str, Sequence[object]]  # x, y, text and key, point for point


def groups_in_plane(
    groups: Mapping[str, Points], colours: Palette, height: int = 620, ungrouped: str = ""
) -> go.Figure:
    """One colour per group, and a muted one for the points of ``ungrouped``.

    ``key`` comes back as ``customdata`` of a clicked point; texts are escaped.
    """
    fig = _empty(colours, height)
    for name, points in groups.items():
        marker = {"size": 5, "opacity": 0.75} | ({"color": colours.muted} if name == ungrouped else {})
        fig.add_scattergl(**_points(points), mode="markers", name=safe(name), marker=marker)
    return fig


def values_in_plane(
    points: Points, values: Sequence[float], name: str, colours: Palette, height: int = 620
) -> go.Figure:
    """Colour by a number, with a scale beside the figure."""
    scale = {"title": {"text": safe(name)}, "tickfont": {"color": colours.text}}
    marker = {"size": 5, "opacity": 0.8, "color": list(values), "colorscale": "Cividis", "colorbar": scale}
    return _empty(colours, height).add_scattergl(**_points(points), mode="markers", marker=marker, showlegend=False)


def _points(points: Points) -> dict[str, object]:
    texts = [safe(str(text)) for text in points["text"]]
    known = {"x": list(points["x"]), "y": list(points["y"]), "customdata": list(points["key"])}
    return {**known, "text": texts, "hovertemplate": "%{text}<extra></extra>"}


def _empty(colours: Palette, height: int) -> go.Figure:
    fig = base(colours, height, showlegend=True)
    hidden = {"visible": False}
    return fig.update_layout(xaxis=hidden, yaxis={**hidden, "scaleanchor": "x"}, dragmode="pan", hovermode="closest")

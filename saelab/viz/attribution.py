"""The figure of an attribution graph: layers above positions, one mark for each latent, error term and token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from saelab.viz.axes import base, shortened, token_names
from saelab.viz.escape import label as safe
from saelab.viz.escape import visible
from saelab.viz.theme import Palette

if TYPE_CHECKING:
    from saelab.attribution import AttributionGraph, Edge, Node

SYMBOLS = {"latent": "circle", "error": "diamond-open", "embedding": "square", "mlp": "diamond", "target": "star"}
NAMES = {"latent": "latents", "error": "error terms", "embedding": "tokens", "mlp": "MLPs", "target": "prediction"}
WIDTHS = ((0.5, 4.0), (0.2, 2.2), (0.0, 1.0))  # least share of the strongest edge, width of the line
MOST_TOKENS = 24  # names below the figure, so that they have room on a narrow page
PLACE = 18  # characters of a place's name beside it
ACROSS, APART = 4, 0.19  # marks side by side in one cell, and their distance


def attribution_graph(
    graph: AttributionGraph,
    colours: Palette,
    examples: Mapping[str, Sequence[str]] | None = None,
    edges: int = 120,
) -> go.Figure:
    """The graph with its ``edges`` strongest edges. A mark's ``customdata`` is its node's name.

    ``examples`` are lines of text for the nodes of latents, shown with the label when a mark is pointed at.
    """
    rows = _rows(graph)
    at = _placed(graph, rows)
    fig = base(colours, 190 + 120 * len(rows), hovermode="closest")
    _draw_edges(fig, graph.edges[:edges], at, colours)
    largest = max((abs(n.effect) for n in graph.nodes if n.kind != "target"), default=1.0) or 1.0
    for kind, symbol in SYMBOLS.items():
        own = [node for node in graph.nodes if node.kind == kind]
        if not own:
            continue
        fig.add_scatter(
            x=[at[n.id][0] for n in own],
            y=[at[n.id][1] for n in own],
            mode="markers",
            showlegend=False,
            marker={
                "symbol": symbol,
                "size": [_size(n, largest) for n in own],
                "color": [colours.positive if n.effect >= 0 else colours.negative for n in own],
                "line": {"width": 1.5, "color": colours.background},
            },
            customdata=[n.id for n in own],
            text=[_hover(graph, n, (examples or {}).get(n.id, ())) for n in own],
            hovertemplate="%{text}<extra></extra>",
        )
        # A legend of its own: colours are signs, and that of the first mark would pass for the kind's.
        marker = {"symbol": symbol, "size": 9, "color": colours.muted}
        fig.add_scatter(x=[None], y=[None], mode="markers", name=NAMES[kind], marker=marker)
    count = len(graph.tokens)
    shown = range(0, count, -(-count // MOST_TOKENS))  # marks are at fractions of a position: no axis of categories
    tokens = [token_names(graph.tokens)[i] for i in shown]
    fig.update_xaxes(tickvals=list(shown), ticktext=tokens, range=[-0.6, count - 0.4])
    places = [safe(short_place(place.name)) for place in graph.places]
    names = ["tokens", *places, safe(shortened(graph.target_text.strip(" "), PLACE)) or "prediction"]
    fig.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[-0.5, len(names) - 0.4])
    return fig.update_xaxes(showgrid=False, zeroline=False).update_yaxes(showgrid=True, zeroline=False)


def short_place(name: str) -> str:
    """A place beside an axis: ``9 resid_post`` for ``blocks.9.hook_resid_post``, of a long path the end."""
    found = name.removeprefix("blocks.").replace(".hook_", " ")
    return found if len(found) <= PLACE else "…" + found[1 - PLACE :]


def node_name(graph: AttributionGraph, node: Node) -> str:
    """What a node is and on which token, in words; as text that has still to be escaped."""
    if node.kind == "target":
        return "the prediction"
    on = f"on ‘{visible(graph.tokens[node.position])}’ ({node.position})"
    if node.kind == "latent":
        return f"{latent_name(graph, node)} {on}"
    what = {"error": "error term", "embedding": "token", "mlp": f"MLP of block {node.layer}"}[node.kind]
    return f"{what} {on}{_place(graph, node) if node.kind == 'error' else ''}"


def latent_name(graph: AttributionGraph, node: Node) -> str:
    """A latent whatever the token: its number, its pole where that is the negative one, its place among several."""
    return f"#{node.latent}{' −' if node.pole < 0 else ''}{_place(graph, node)}"


def _place(graph: AttributionGraph, node: Node) -> str:
    return f" at {graph.place(node).name}" if len(graph.places) > 1 else ""


def _rows(graph: AttributionGraph) -> dict[int, int]:
    """The row of each place's layer; tokens are row 0, the prediction is the last."""
    return {place.layer: i + 1 for i, place in enumerate(graph.places)}


def _row(graph: AttributionGraph, rows: Mapping[int, int], node: Node) -> float:
    if node.kind == "embedding":
        return 0.0
    if node.kind == "target":
        return len(rows) + 1.0
    if node.kind == "mlp":  # between the places around its block
        return 0.5 + sum(place.layer <= node.layer for place in graph.places)
    return float(rows[node.layer])


def _placed(graph: AttributionGraph, rows: Mapping[int, int]) -> dict[str, tuple[float, float]]:
    """Where each node is drawn; those of one cell stand side by side, in lines."""
    cells: dict[tuple[float, int], int] = {}
    sizes: dict[tuple[float, int], int] = {}
    for node in graph.nodes:
        cell = _row(graph, rows, node), node.position
        sizes[cell] = sizes.get(cell, 0) + 1
    found = {}
    for node in graph.nodes:
        cell = _row(graph, rows, node), node.position
        i = cells[cell] = cells.get(cell, -1) + 1
        line, column = divmod(i, ACROSS)
        width = min(ACROSS, sizes[cell] - line * ACROSS)
        x = node.position + APART * (column - (width - 1) / 2)
        found[node.id] = (x, cell[0] + 0.11 * line)
    return found


def _draw_edges(fig: go.Figure, edges: Sequence[Edge], at: Mapping[str, tuple[float, float]], colours: Palette) -> None:
    largest = max((abs(edge.effect) for edge in edges), default=1.0) or 1.0
    upper = 2.0
    for share, width in WIDTHS:
        for sign, colour in ((1, colours.positive), (-1, colours.negative)):
            own = [e for e in edges if share <= abs(e.effect) / largest < upper and e.effect * sign > 0]
            if not own:
                continue
            xs, ys = [], []
            for edge in own:
                (x0, y0), (x1, y1) = at[edge.source], at[edge.target]
                xs += [x0, x1, None]
                ys += [y0, y1, None]
            line = {"width": width, "color": colour}
            fig.add_scatter(x=xs, y=ys, mode="lines", line=line, opacity=0.35, hoverinfo="skip", showlegend=False)
        upper = share


def _size(node: Node, largest: float) -> float:
    return 16.0 if node.kind == "target" else 6.0 + 16.0 * (abs(node.effect) / largest) ** 0.5


def _hover(graph: AttributionGraph, node: Node, examples: Sequence[str]) -> str:
    lines = [f"<b>{safe(node_name(graph, node))}</b>"]
    if node.label:
        lines.append(safe(node.label))
    if node.activation is not None:
        lines.append(f"activation {node.activation:+.3g}")
    lines.append(f"effect {node.effect:+.4g}, direct {node.direct:+.4g}")
    lines += [safe(example) for example in examples]
    return "<br>".join(lines)

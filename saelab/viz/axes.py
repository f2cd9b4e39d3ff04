"""The house style of every figure, and its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from saelab.viz.escape import label as safe
from saelab.viz.theme import Palette

LONGEST = 10  # characters of a token below an axis: turned upright, a longer one would take the figure's height


def base(colours: Palette, height: int = 300, x: str = "", y: str = "", **layout: Any) -> go.Figure:
    """An empty figure in the house style."""
    axis = {"gridcolor": colours.grid, "zerolinecolor": colours.grid, "linecolor": colours.grid, "automargin": True}
    axis |= {"exponentformat": "power", "minexponent": 3}
    fig = go.Figure()
    fig.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": colours.text, "size": 12.5, "family": '"Source Sans", "Source Sans Pro", sans-serif'},
        colorway=list(colours.series),
        xaxis={"title": {"text": x, "standoff": 8}, **axis},
        yaxis={"title": {"text": y, "standoff": 10}, **axis},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"color": colours.text}},
        hoverlabel={"bgcolor": colours.surface, "font": {"color": colours.text}, "align": "left"},
        # Without colours of its own the tool bar is a dark block on a transparent page.
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": colours.muted, "activecolor": colours.text},
        bargap=0.06,
    )
    return fig.update_layout(**layout)


def shortened(text: str, most: int) -> str:
    """A text of at most ``most`` characters, with an ellipsis where something is left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


def token_names(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels of an axis: escaped, short, and never empty."""
    return [safe(shortened(token.strip(" "), LONGEST)) or "␣" for token in tokens]


def token_axis(tokens: Sequence[str]) -> dict[str, Any]:
    """An axis of tokens for values at ``"0"``, ``"1"`` ...: at any width as many labels as do not overlap.

    Plotly thins out the labels of categories by the width that it finds, but not those that it is given as a list.
    """
    return {"type": "category", "labelalias": {str(i): name for i, name in enumerate(token_names(tokens))}}


def log_axis(values: Sequence[float], most: int = 8) -> dict[str, Any]:
    """A logarithmic axis over the positive ``values`` with at most ``most`` round labels; linear where that is enough.

    Plotly would label the digits between powers of ten without their power.
    """
    positive = [v for v in values if v > 0]
    if not positive or max(positive) < 1.5 * min(positive):
        return {"type": "linear"}
    ticks = round_ticks(0.95 * min(positive), 1.05 * max(positive), most)
    return {"type": "log", "tickvals": ticks, "ticktext": [written(tick) for tick in ticks]}


def round_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """At most ``most`` round numbers from ``low`` to ``high``, evenly spread on a log scale; ``low`` above 0."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in decades for m in digits if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            break
    return ticks[:: -(-len(ticks) // most)] if ticks else []


def written(tick: float) -> str:
    """A round number as an axis shows it: 0.01, 500, 20k, 3M, 10⁻⁴."""
    if tick >= 1000:
        power = min(3, int(np.log10(tick) + 1e-9) // 3)
        return f"{tick / 1000**power:g}{'kMG'[power - 1]}"
    if tick >= 0.001:
        return f"{tick:g}"
    digit, exponent = f"{tick:.0e}".split("e")
    return ("" if digit == "1" else f"{digit}×") + "10" + str(int(exponent)).translate(_RAISED)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

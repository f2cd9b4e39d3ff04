"""One latent or one figure as a file: a page that needs no server, or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from saelab.files import finite
from saelab.viz.escape import plain
from saelab.viz.theme import LIGHT
from saelab.viz.tokens import example_list, fact_table, style_sheet, token_chips

FACTS = ("count", "density", "max", "mean", "token_entropy", "token_share", "position_corr", "norm_corr", "mean_cosine")


def latent_page(title: str, poles: Mapping[int, Mapping[str, Any]], examples: Mapping[int, Sequence[Any]]) -> str:
    """A complete HTML document about one latent: ``{pole: row of the index}`` and ``{pole: examples}``."""
    parts = []
    for pole, row in poles.items():
        scale = float(row["max"]) or None
        parts.append(f"<h2>{'Positive' if pole > 0 else 'Negative'} pole</h2>" if len(poles) > 1 else "")
        parts.append(fact_table([(name, f"{row[name]:.6g}", "") for name in FACTS if name in row]))
        for name in ("promoted", "suppressed"):
            if row.get(name):
                parts.append(f"<h3>{name}</h3>" + token_chips(row[name], row[f"{name}_logits"], LIGHT))
        parts.append("<h3>Examples</h3>" + example_list(examples.get(pole, ()), LIGHT, scale))
    body = "max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font-family: sans-serif"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{plain(title)}</title>'
        # Nothing in the file may run or load, whatever a reader adds to it.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'{style_sheet(LIGHT)}</head><body style="{body}"><h1>{plain(title)}</h1>{"".join(parts)}</body></html>'
    )


def latent_json(poles: Mapping[int, Mapping[str, Any]], examples: Mapping[int, Sequence[Any]], **about: Any) -> str:
    """The same as JSON; numbers that are not finite become null."""
    content = {
        **about,
        "poles": [
            {**row, "examples": [dataclasses.asdict(e) for e in examples.get(pole, ())]} for pole, row in poles.items()
        ],
    }
    return json.dumps(finite(content), indent=1, ensure_ascii=False)


def figure_page(figure: Any, title: str) -> str:
    """A complete HTML document with an interactive figure; everything it needs is inside."""
    body = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{plain(title)}</title></head>'
        f'<body style="font-family: sans-serif; background: {LIGHT.background}"><h1>{plain(title)}</h1>{body}'
        "</body></html>"
    )

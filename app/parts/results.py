"""Tables of what a search found. The row that is shown beside the table is marked, whoever chose it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from parts import reading, tables
from saelab import viz
from saelab.features.indexing.labels import POOR

SHOWN = 500
_number = st.column_config.NumberColumn
COLUMNS = {
    **tables.COLUMNS,
    "share": _number("on it", format="percent", width=70, help="share of its firing magnitude on the words"),
    "about": st.column_config.TextColumn("label", width=260, help=f"in brackets: F1 below {POOR:g}, a poor guess"),
    "my label": st.column_config.TextColumn("my label", width=140),
    "SAE": st.column_config.TextColumn("SAE", width=160),
    "specificity": _number(format="%.2f", help="(mean on the span − mean elsewhere) × −log₂ density, in maxima"),
    "low": _number(format="%.2f", help="5 % quantile over 200 bootstrap samples of the tokens, seed 0"),
    "high": _number(format="%.2f", help="95 % quantile over 200 bootstrap samples of the tokens, seed 0"),
    "on_span": _number("on the span", format="percent", help="share of marked tokens it fires on"),
    "off_span": _number("elsewhere", format="percent", help="share of all other tokens it fires on"),
}


def latents(found: pd.DataFrame, signed: bool, own: dict[int, dict[str, str]], key: str) -> None:
    """What words, a number or filters found."""
    columns = ["latent", *(["pole"] if signed else []), "share", "label_score", "top_tokens", "density", "max"]
    view: Any = tables.shown(found, *columns, "token_entropy", "promoted")
    view.insert(columns.index("label_score"), "about", about(found))
    if any(found["explanation"]):
        view.insert(columns.index("label_score"), "explanation", found["explanation"].map(viz.visible))
    if own:
        names = [viz.visible(own.get(n, {}).get("label", "")) for n in found["latent"]]
        view.insert(1, "my label", names)
    empty = [name for name in ("share", "label_score") if view[name].isna().all()]
    _table(view.drop(columns=empty), key)


def matches(found: pd.DataFrame, signed: bool, key: str) -> None:
    """What a marked text found, with what the index knows of it."""
    poles = ["pole"] if signed else []
    names = ["latent", *poles, "specificity", "low", "high", "on_span", "off_span", "density", "top_tokens"]
    view = tables.shown(found, *names)
    view.insert(len(names) - 2, "about", about(found))
    _table(view, key)


def everywhere(found: pd.DataFrame, key: str) -> int | None:
    """What was found in all SAEs; the row that was clicked."""
    view = tables.shown(found, "latent", "pole", "share", "label_score", "top_tokens", "density")
    view.insert(0, "SAE", found["SAE"].map(viz.visible))
    view.insert(4, "about", about(found))
    return tables.picked_row(_table(view, key, on_select="rerun"), range(len(found)))


def download(found: pd.DataFrame, name: str, key: str) -> None:
    """All rows that were found, not only those that the table has room for, as a file."""
    shown = [column for column in found.columns if not column.endswith("_lower")]
    st.download_button(
        f"All {len(found):,} rows as CSV",
        lambda: found[shown].to_csv(index=False).encode(),
        f"{name.replace('/', '-')}.csv",
        "text/csv",
        key=key,
        icon=":material/download:",
        on_click="ignore",
        type="tertiary",
    )


def about(rows: pd.DataFrame) -> list[str]:
    """Labels; a poor one in brackets."""
    pairs = zip(rows["label"].fillna(""), rows["label_score"].fillna(0.0))
    return [viz.visible(label if score >= POOR or not label else f"({label})") for label, score in pairs]


def _table(view: pd.DataFrame, key: str, on_select: Any = None) -> Any:
    return st.dataframe(
        view,
        hide_index=True,
        column_config={name: COLUMNS[name] for name in view.columns if name in COLUMNS},
        on_select=on_select or (lambda: reading.clicked(key)),
        selection_mode=tables.CLICK,
        key=key,
        height=620,
        placeholder="–",
        alt="Latents; choose a row to see one, or walk with the arrow keys",
    )

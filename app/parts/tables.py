"""Tables of latents: one row per latent and pole, a click chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import streamlit as st

from saelab import viz
from saelab.comparison import matching_poles

Chosen = tuple[int, int]  # latent, pole


class Pair(NamedTuple):
    """A latent's pole of either SAE; a latent of -1 is none."""

    left: int
    left_pole: int
    right: int
    right_pole: int


CLICK: Any = ["single-row", "single-cell"]  # a row is chosen by its box, by the keyboard, or by a click on any cell
DECADES = [0.0, *(m * 10.0**e for e in range(-7, 0) for m in (1, 3)), 0.5, 1.0]
COLUMNS = {
    "latent": st.column_config.NumberColumn("latent", format="%d", width=70),
    "pole": st.column_config.TextColumn("pole", width=50),
    "label": st.column_config.TextColumn("label", width=140),
    "label_score": st.column_config.NumberColumn(
        "score", format="%.2f", width=60, help="F1 of the label as a detector of firing, on text it was not chosen on"
    ),
    "top_tokens": st.column_config.TextColumn("fires on", width=140, help="tokens it fires on most often"),
    "promoted": st.column_config.TextColumn("promotes", width=150, help="tokens whose logits it raises most"),
    "density": st.column_config.NumberColumn("density", format="%.1e", width=75, help="share of tokens it fires on"),
    "max": st.column_config.NumberColumn("max", format="%.1f", width=60, help="largest magnitude, raw units"),
    "token_entropy": st.column_config.NumberColumn(
        "entropy", format="%.1f", width=70, help="bits, of the token it fires on"
    ),
}


def picked_row(event: Any, names: Sequence[Any]) -> Any:
    """What a table's selection stands for: ``names`` has an entry for each row. None where nothing is chosen."""
    chosen = [*event.selection.rows, *(cell[0] for cell in event.selection.cells)]
    return names[chosen[0]] if chosen and chosen[0] < len(names) else None


def decade(value: float) -> str:
    """A density as text: per cent from 1 % up, else in scientific notation."""
    return f"{value:.0%}" if value >= 0.01 or value == 0 else f"{value:.0e}"


def two_poles(table: pd.DataFrame) -> bool:
    """Whether a catalogue has a row for the negative pole of its latents."""
    return -1 in set(table["pole"])


def sign(pole: int) -> str:
    return "+" if pole > 0 else "−"


def shown(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A copy to show: corpus text made visible, the pole as a sign."""
    view = pd.DataFrame({name: table[name] for name in columns})
    for name in view.columns.intersection(["label", "explanation", "top_tokens", "promoted", "my label"]):
        view[name] = view[name].fillna("").map(viz.visible)
    if "pole" in view:
        view["pole"] = view["pole"].map(sign)
    return view


def silent_pairs(matched: pd.DataFrame, known: tuple[pd.DataFrame | None, pd.DataFrame | None]) -> int:
    """Matched pairs of which a latent never fired, as far as the catalogues of both sides tell."""
    silent = pd.Series(False, index=matched.index)
    for side, table in zip(("left", "right"), known):
        if table is not None:
            fired: Any = table.groupby("latent")["count"].sum()  # over both poles
            silent |= matched[side].map(fired).fillna(0).eq(0)
    return int(silent.sum())


def pairs(
    found: Any, view: str, key: str, known: tuple[pd.DataFrame | None, pd.DataFrame | None], signed: tuple[bool, bool]
) -> Pair | None:
    """Matched pairs, or the unmatched latents of one side with their closest counterpart.

    ``known`` are the catalogues of both sides, None where there is no index; ``signed`` says which have two poles.
    """
    number = st.column_config.NumberColumn
    config = {name: number(format="%+.2f") for name in ("cosine", "correlation", "similarity")}
    if view == "matched pairs":
        rows = found.pairs.copy()
        ends = rows[["left", "right"]]
    else:
        side = "left" if view.endswith("left") else "right"
        rows = getattr(found, side)
        rows = rows[rows["partner"] < 0].drop(columns="partner").rename(columns={"best": "closest"})
        rows["related"] = [", ".join(f"#{j}" for j in related) for related in rows["related"]]
        ends = rows[["latent", "closest"] if side == "left" else ["closest", "latent"]]
    turned = matching_poles(rows["cosine"].fillna(0.0), signed)
    for i, (side, table) in enumerate(zip(("left", "right"), known)):
        if signed[i]:
            rows.insert(rows.columns.get_loc(ends.columns[i]) + 1, f"{side} pole", [sign(pole) for pole in turned[i]])
        if table is not None:
            tokens = table.set_index(["latent", "pole"])["top_tokens"]
            at = pd.MultiIndex.from_arrays([ends.iloc[:, i].to_numpy(), turned[i]])
            rows[f"{side} fires on"] = tokens.reindex(at).fillna("").map(viz.visible).to_numpy()
    if "correlation" in rows and rows["correlation"].isna().all():
        rows = rows.drop(columns=["correlation", "similarity"])  # without activations the cosine is all there is
    event = st.dataframe(
        rows,
        hide_index=True,
        column_config=config,
        on_select="rerun",
        selection_mode=CLICK,
        key=f"{key}_{view}",
        height=320,
        placeholder="–",
        alt="Latents of two SAEs with their similarity",
    )
    chosen = picked_row(event, range(len(rows)))
    if chosen is None and not len(rows):
        return None
    at = chosen or 0
    return Pair(int(ends.iloc[at, 0]), int(turned[0][at]), int(ends.iloc[at, 1]), int(turned[1][at]))


def neighbours(row: dict[str, Any], table: pd.DataFrame, key: str) -> Chosen | None:
    """Latents whose decoder rows are closest to that of a latent's pole, with the poles that point the same way."""
    rows = pd.DataFrame({"latent": row["neighbours"], "cosine": row["neighbour_cosines"]})
    if rows.empty:
        st.caption("There is no other latent.")
        return None
    two = two_poles(table)
    rows["pole"] = [row["pole"] * (1 if c >= 0 else -1) if two else 1 for c in rows["cosine"]]
    rows = rows.merge(table, on=["latent", "pole"], how="left")
    extra = {"cosine": st.column_config.NumberColumn("cosine", format="%+.2f", help="of the decoder rows")}
    columns = ["latent", *(["pole"] if two else []), "cosine", "top_tokens", "label"]
    return _choose(shown(rows, *columns), rows, key, extra)


def partners(row: dict[str, Any], table: pd.DataFrame, key: str) -> Chosen | None:
    """Latents that fire on the same tokens."""
    rows = pd.DataFrame(
        {
            "latent": row["partners"],
            "pole": row["partner_poles"],
            "jaccard": row["partner_jaccard"],
            "pmi": row["partner_pmi"],
        }
    )
    if rows.empty:
        st.caption("No latent fires together with this one often enough to tell.")
        return None
    rows = rows.astype({"latent": "int32", "pole": "int8"}).merge(table, on=["latent", "pole"], how="left")
    extra = {
        "jaccard": st.column_config.NumberColumn("Jaccard", format="%.2f", help="both fire / either fires"),
        "pmi": st.column_config.NumberColumn("PMI", format="%.1f", help="bits: how much likelier together than apart"),
    }
    columns = ["latent", *(["pole"] if two_poles(table) else []), "jaccard", "pmi", "top_tokens", "label"]
    return _choose(shown(rows, *columns), rows, key, extra)


def simple(
    view: pd.DataFrame,
    poles: pd.DataFrame,
    key: str,
    config: dict[str, Any] | None = None,
    height: int | None = None,
) -> Chosen | None:
    """Any table whose rows stand for latents; ``poles`` holds the columns latent and pole, row for row."""
    return _choose(view, poles, key, config, height)


def _choose(
    view: pd.DataFrame, rows: pd.DataFrame, key: str, extra: dict[str, Any] | None = None, height: int | None = None
) -> Chosen | None:
    event = st.dataframe(
        view,
        hide_index=True,
        column_config={**COLUMNS, **(extra or {})},
        on_select="rerun",
        selection_mode=CLICK,
        key=key,
        height=height or "auto",
        alt="Latents; choose a row to see one",
    )
    at = picked_row(event, range(len(rows)))
    return None if at is None else (int(rows["latent"].iloc[at]), int(rows["pole"].iloc[at]))

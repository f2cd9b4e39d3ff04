"""The search of the Features page: one box, filters, and what they find. All of it is part of the address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import loaders
import page
import pandas as pd
import session
import streamlit as st
import torch

from parts import results as results_table
from parts import tables
from saelab import viz
from saelab.features import FeatureIndex, search
from saelab.features.by_example import find_by_example
from saelab.features.finding import ANYTHING, WRITES, Query, find_in, read_query
from saelab.metrics.density import DENSE
from saelab.runs import Run
from saelab.workspace.notes import read_notes

SORTS = {
    "best": "best match",
    "telling": "most telling",
    "label_score": "best label",
    "density": "most frequent",
    "max": "strongest",
    "token_entropy": "most token-specific",
    "latent": "latent number",
}
ASCENDING = {"latent", "token_entropy"}
EVERY = 5  # latents of each SAE in a search of all
PLACEHOLDER = "words, a latent's number, or a text with [[marks]]"
ROLE = "Latents whose strongest examples are mostly in messages of this role of a chat."
HELP = (
    '`war` finds the whole word, `rain*` any ending, `world war` both words, `"world war"` the phrase in labels; '
    "`#12` or `12-` a latent; `The [[sea]] is calm` runs the text through the model and finds what fires on the marks."
)


IN = (
    f"“{WRITES}” ranks latents by the share of the logits they promote that falls on the words, not by what they fire "
    "on: those are the ones to try for steering."
)


class Asked(NamedTuple):
    """What stands in the box and the filters."""

    query: Query
    text: str
    where: str
    sort: str
    filters: dict[str, Any]
    dense: bool  # shown too
    related: bool
    everywhere: bool

    @property
    def key(self) -> str:
        """A table's key: another question is another table, with nothing chosen in it."""
        return (
            f"found_{hash((self.text, self.where, self.sort, str(self.filters), self.dense, self.related)) & 0xFFFFFF}"
        )


def box(table: pd.DataFrame, signed: bool) -> Asked:
    """The box and the filters."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input(
            "Search", placeholder=PLACEHOLDER, icon=":material/search:", help=HELP, **session.held_text("q")
        )
        places = [ANYTHING, *search.TEXT_COLUMNS, WRITES]
        where = st.selectbox("in", places, width=160, help=IN, **session.held("where", ANYTHING))
        sort = st.selectbox(
            "sort by",
            list(SORTS),
            format_func=SORTS.__getitem__,
            width=180,
            **session.held("sort", "best", SORTS.__getitem__),
        )
    with st.container(horizontal=True, vertical_alignment="center"):
        filters = _filters(table, signed)
        fires = f"show latents that fire on more than {DENSE:.0%}"
        dense = st.toggle("dense", help=fires, **session.held("dense", False))
        related = st.toggle("similar meaning", help=SIMILAR, **session.held("similar", False))
        everywhere = len(with_index()) > 1 and st.toggle("all SAEs", help=ALL, **session.held("everywhere", False))
    session.say_unshared("q")
    return Asked(read_query(text or ""), text or "", where, sort, filters, dense, related, everywhere)


SIMILAR = (
    "Add latents about words that keep company with these, by latent semantic analysis of the index. "
    "No language model is asked."
)
ALL = "Search every SAE of the folder, and show the best of each."


def _filters(table: pd.DataFrame, signed: bool) -> dict[str, Any]:
    state = st.pills("state", list(search.STATES), label_visibility="collapsed", **session.held("state"))
    found: dict[str, Any] = {"state": state}
    if signed:
        pole = st.pills("pole", ["+ pole", "− pole"], label_visibility="collapsed", **session.held("sign"))
        found["pole"] = None if pole is None else (1 if pole.startswith("+") else -1)
    roles = sorted(set(table["role"]) - {""})
    if len(roles) > 1:
        found["role"] = st.pills("fires on", roles, label_visibility="collapsed", help=ROLE, **session.held("role"))
    used = 0
    for name, every in (("density", (0.0, 1.0)), ("entropy", (0.0, 16.0))):
        # A link's values are those of the widgets once these are drawn, which comes after the popover's title.
        used += tuple(st.session_state[name]) != every if name in st.session_state else name in st.query_params
    with st.popover(f"More filters ({used})" if used else "More filters", icon=":material/filter_alt:"):
        density = st.select_slider(
            "share of tokens it fires on",
            tables.DECADES,
            value=(0.0, 1.0),
            format_func=tables.decade,
            **session.held("density", (0.0, 1.0), tables.decade),
        )
        entropy = st.slider(
            "entropy of its tokens, bits", 0.0, 16.0, (0.0, 16.0), 0.5, **session.held("entropy", (0.0, 16.0))
        )
    found["density"] = None if density == (0.0, 1.0) else density
    found["entropy"] = None if entropy == (0.0, 16.0) else entropy
    return found


def results(run: Run, asked: Asked) -> pd.DataFrame:
    """The latents that words, a number or the filters find, in order; what is added by meaning is said above them."""
    finder = loaders.finder(run)
    found: Any = finder.find(asked.text, asked.where, read_notes(loaders.place(run)))
    near: list[str] = []
    if asked.query.kind == "words" and (asked.related or found.empty):
        with st.spinner("Learning which words keep company …"):
            close, near = finder.related(asked.text)
        found = pd.concat([found, close[~close.index.isin(found.index)]])
    return _narrowed(found, asked, len(finder.table), near)


def by_text(run: Run, index: FeatureIndex, table: pd.DataFrame, asked: Asked) -> pd.DataFrame:
    """The latents that fire on the marks of a text and not elsewhere, of those that fit; needs the language model."""
    contrast = st.text_input(
        "Contrast (optional)", placeholder="a text where it should be silent", **session.held_text("contrast")
    )
    plain, spans = search.marked(asked.text)
    read = loaders.read_text(run, plain, "Searching by example")
    other = loaders.read_text(run, contrast, "Searching by example") if (contrast or "").strip() else None
    marks = torch.tensor(search.tokens_in(read.strings, spans, offset=read.front)[read.first :])
    contrasted = None if other is None else other.code[other.first : other.n]
    # All of them: what the filters leave would not be among the first of those that they leave out.
    found = find_by_example(index, read.code[read.first : read.n], marks, contrasted, top=len(table))
    ignored = [f"“in: {asked.where}”"] * (asked.where != ANYTHING) + ["“similar meaning”"] * asked.related
    if ignored:
        st.caption(f"Not applied to a text: {' and '.join(ignored)}. They are about words.")
    known = table[[name for name in table if name in ("latent", "pole") or name not in found]]
    return _narrowed(found.merge(known, on=["latent", "pole"], how="left"), asked, len(found))


def _narrowed(found: pd.DataFrame, asked: Asked, total: int, near: Sequence[str] = ()) -> pd.DataFrame:
    """What passes the filters, in the chosen order; what is left out is said, and can be had back."""
    found, hidden = fitting(found, asked)
    if asked.sort != "best":
        found = found.sort_values(asked.sort, ascending=asked.sort in ASCENDING, kind="stable")
    said = f"{len(found):,} of {total:,}"
    said += f", the first {results_table.SHOWN:,} shown" if len(found) > results_table.SHOWN else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(said)
        if hidden:
            st.button(f"{hidden:,} dense hidden ✕", key="show_dense", type="tertiary", on_click=_show_dense)
        if near:
            st.caption("similar: " + ", ".join(viz.markdown(word) for word in near))
    return found


def fitting(found: pd.DataFrame, asked: Asked) -> tuple[pd.DataFrame, int]:
    """The rows that pass the filters, and how many dense ones are hidden besides."""
    rows: Any = search.narrow(found, **asked.filters)
    if asked.dense or asked.filters["state"] in {"dense", "ultra-dense"}:
        return rows, 0
    shown = ~(rows["density"] > DENSE)
    if "score" in rows:
        shown |= rows["score"] == float("inf")  # a latent that was asked for by its number
    return rows[shown], int((~shown).sum())


def _show_dense() -> None:
    st.session_state["dense"] = True


def with_index() -> dict[str, Run]:
    """The SAEs of the folder that can be searched."""
    return {name: run for name, run in loaders.workspace().runs.items() if run.has_index}


def everywhere(asked: Asked) -> None:
    """The same question to all SAEs of the folder, in one table; a click opens a latent."""
    if asked.query.kind not in {"words", "latent"}:
        st.caption("Type words to search for in all SAEs.")
        return
    runs, finders, notes = with_index(), {}, {}
    for name, run in runs.items():
        with page.part():  # a damaged SAE says so, and the others are searched
            finders[name], notes[name] = loaders.finder(run), read_notes(loaders.place(run))
    found: Any = find_in(
        finders, asked.text, notes, top=EVERY, where=asked.where, keep=lambda rows: fitting(rows, asked)[0]
    )
    if found.empty:
        st.caption("No latent fits.")
    else:
        place = results_table.everywhere(found, key=f"everywhere_{asked.key}")
        if place is not None:
            row = found.iloc[place]
            session.open_latent(int(row["latent"]), int(row["pole"]), runs[row["SAE"]])

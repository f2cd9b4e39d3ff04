"""All latents of an SAE: search by text or by example, filter, and preview one beside the table."""

import loaders
import session
import streamlit as st
import torch
from parts import latent as latent_parts
from parts import source as source_parts
from parts import tables

from saelab.features import search
from saelab.features.by_example import find_by_example
from saelab.workspace.notes import read_notes

SHOWN = 1000
SORTS = {
    "telling": "most telling",
    "label_score": "best label",
    "density": "most frequent",
    "max": "strongest",
    "token_entropy": "most token-specific",
    "latent": "latent number",
}

ROLE = "Latents whose strongest examples are mostly in messages of this role of a chat."

st.title("Features", anchor=False)
run = session.need_run()
index = loaders.need_index(run)
table = loaders.catalogue(run)
signed = len(index.poles) > 1

by_text, by_example = st.tabs(["Search by text", "Search by example"])
with by_text:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input(
            "Search",
            key="features_text",
            placeholder="a token or a label",
            icon=":material/search:",
            **session.KEEP,
        )
        where = st.selectbox("in", ["anything", *search.TEXT_COLUMNS], key="features_where", width=140, **session.KEEP)
        sort = st.selectbox(
            "sort by", list(SORTS), format_func=SORTS.__getitem__, key="features_sort", width=180, **session.KEEP
        )
    with st.container(horizontal=True, vertical_alignment="center"):
        state = st.pills(
            "state", list(search.STATES), key="features_state", label_visibility="collapsed", **session.KEEP
        )
        pole = None
        if signed:
            pole = st.pills(
                "pole", ["+ pole", "− pole"], key="features_pole", label_visibility="collapsed", **session.KEEP
            )
        roles = sorted(set(table["role"]) - {""})
        role = None
        if len(roles) > 1:
            role = st.pills(
                "fires on", roles, key="features_role", label_visibility="collapsed", help=ROLE, **session.KEEP
            )
        with st.popover("More filters", icon=":material/filter_alt:"):
            density = st.select_slider(
                "share of tokens it fires on",
                tables.DECADES,
                value=(0.0, 1.0),
                format_func=tables.decade,
                key="features_density",
                **session.KEEP,
            )
            entropy = st.slider(
                "entropy of its tokens, bits",
                0.0,
                16.0,
                (0.0, 16.0),
                0.5,
                key="features_entropy",
                **session.KEEP,
            )
        source_parts.of_index(
            run, index, ("density", "max", "token_entropy", "label", "label_score", "promoted_logits")
        )
    found = search.find(table, text, where)
    found = search.narrow(
        found,
        pole=None if pole is None else (1 if pole.startswith("+") else -1),
        state=state,
        density=None if density == (0.0, 1.0) else density,
        entropy=None if entropy == (0.0, 16.0) else entropy,
        role=role,
    )
    if text.strip() and sort == "telling":
        found = search.by_closeness(found, text)
    else:
        found = found.sort_values(sort, ascending=sort in {"latent", "token_entropy"}, kind="stable")
    note = f"{len(found):,} of {len(table):,}" + (f", the first {SHOWN:,} shown" if len(found) > SHOWN else "")
    left, right = st.columns([3, 2], gap="medium")
    with left:
        st.caption(note)
        picked = tables.latents(found.head(SHOWN), signed, read_notes(loaders.place(run)), key="features_table")
    last = st.session_state.get("features_last")
    if picked is not None:
        st.session_state["features_last"] = ((run.name, text), picked)
    elif last is not None and last[0] == (run.name, text):
        # On return from a latent's page, the latent that was viewed last is selected.
        picked = last[1]
    with right:
        if picked is None and len(found):
            # Something to look at before the first click.
            picked = int(found["latent"].iloc[0]), int(found["pole"].iloc[0])
        if picked is None:
            st.caption("No latent fits.")
        else:
            latent_parts.preview(run, index, *picked, key="features_preview")

with by_example:
    st.markdown(
        "Paste a text, mark with `[[ ]]` what the latent should stand for, and give a text where it should be silent."
    )
    with st.form("example", border=False):
        columns = st.columns(2)
        example = columns[0].text_area(
            "Example", key="features_example", placeholder="The [[river]] runs past a mill.", **session.KEEP
        )
        contrast = columns[1].text_area(
            "Contrast (optional)", key="features_contrast", placeholder="The road is dry.", **session.KEEP
        )
        asked = st.form_submit_button("Find latents", icon=":material/search:")
    if asked:
        plain, spans = search.marked(example)
        read = loaders.read_text(run, plain, "Searching by example")
        other = loaders.read_text(run, contrast, "Searching by example") if contrast.strip() else None
        marks = search.tokens_in(read.strings, spans, offset=read.first)
        contrasted = None if other is None else other.code[other.first : other.n]
        code = read.code[read.first : read.n]
        matches = find_by_example(index, code, torch.tensor(marks[read.first :]), contrasted)
        st.session_state["features_matches"] = (run.name, matches)
    name, matches = st.session_state.get("features_matches", (None, None))
    if name == run.name and len(matches):
        chosen = tables.matches(matches, table, key="features_match_table")
        with st.container(width=620):
            latent_parts.preview(run, index, *chosen, key="features_match")
    elif name == run.name:
        st.caption("No latent fires on the marked tokens.")

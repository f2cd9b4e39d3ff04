"""One latent: each pole with its examples, strengths and logit effects; its neighbours, partners and notes."""

import loaders
import page
import session
import streamlit as st
from parts import collections as collection_parts
from parts import evidence, examine, reading, tables
from parts import latent as latent_parts
from parts import source as source_parts

KINDS = {
    "top": "top",
    "groups": "by strength",
    "q75": "75–100 %",
    "q50": "50–75 %",
    "q25": "25–50 %",
    "q00": "0–25 %",
    "random": "random",
}
SOURCES = (
    *("density", "max", "mean", "token_entropy", "histogram", "promoted_logits", "neighbour_cosines"),
    *("partner_jaccard", "partner_pmi", "label", "label_score"),
)

run = session.need_run()
index = loaders.need_index(run, "Latent")
table = loaders.catalogue(run)
signed = len(index.poles) > 1
asked = st.session_state.get("latent", 0)
latent = min(max(asked, 0), index.d_sae - 1)
pole = st.session_state.get("pole", 1)
pole = pole if pole in index.poles else 1
rows = {p: index.latent(latent, p) for p in index.poles}
fault = session.faulty_link()
if latent != asked or fault:
    st.warning(
        f"There is no {fault or f'latent {asked}'} in this SAE: it has latents 0 to "
        f"{index.d_sae - 1:,}. This is latent {latent}.",
        icon=":material/link_off:",
    )

with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
    st.title(f"Latent {latent_parts.title(rows[pole], signed, latent_parts.names(run))}", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", width="content"):
        chosen = st.number_input("latent", 0, index.d_sae - 1, latent, key=f"latent_number_{latent}", width=150)
        if chosen != latent:
            session.open_latent(chosen, 1)
        if st.button("Steer with it", icon=":material/tune:", key="latent_steer"):
            session.steer_with(run, latent, pole)
        collection_parts.add_form(run, latent, pole)
        reading.history("latent_history")
        latent_parts.downloads(run, index, latent, rows)
        source_parts.of_index(run, index, SOURCES)
st.session_state["latent"], st.session_state["pole"] = latent, pole
session.show_link(run=run.name, latent=latent, pole=pole)
page.to_top(f"{run.name} {latent}")

name = latent_parts.title(rows[pole], signed, latent_parts.names(run))
reading.visited(run, latent, pole, name)
examine.own_text(run, index, latent, index.poles)
if signed:
    latent_parts.axis(run, latent)
for column, side in zip(st.columns(len(index.poles), gap="medium"), index.poles):
    row = rows[side]
    with column, st.container(border=signed):
        if signed:
            latent_parts.pole_heading(row)
        if not row["count"]:
            latent_parts.silent(index, signed)
        else:
            latent_parts.explanation(run, latent, side)
            examine.explain(run, index, latent, side)
            latent_parts.numbers(row)
            evidence.latent(run, latent, row)
            latent_parts.label_scores(row)
            known = {example.kind for example in index.examples(latent, side)}
            known |= {"groups"} if "q75" in known else set()
            kind = st.segmented_control(
                "examples",
                [name for name in KINDS if name in known] or ["top"],
                default="top",
                required=True,
                format_func=KINDS.__getitem__,
                label_visibility="collapsed",
                **session.held(f"latent_kind_{side}", "top", KINDS.__getitem__),
            )
            if kind == "groups":
                examine.groups(run, index, latent, side, row)
            elif kind == "top" and len(index.roles) == 0:
                examine.top(run, index, latent, side)
            else:
                latent_parts.examples(index, latent, side, kind)
            latent_parts.histogram(row, index, key=f"latent_histogram_{side}")
        examine.logits(run, row, key=f"latent_logits_{side}")

left, right = st.columns(2, gap="medium")
with left:
    st.subheader("Closest directions", anchor=False)
    near = tables.neighbours(rows[pole], table, key=f"latent_neighbours_{latent}")
with right:
    st.subheader("Fires together with", anchor=False)
    together = tables.partners(rows[pole], table, key=f"latent_partners_{latent}")
if chosen_beside := near or together:
    session.open_latent(*chosen_beside)

left, right = st.columns(2, gap="medium")
with left:
    latent_parts.other_saes(run, latent)
    st.subheader("Correlations and weights", anchor=False)
    latent_parts.facts(rows)
with right:
    st.subheader("Notes", anchor=False)
    latent_parts.notes_form(run, latent)

if run.has_weights:
    examine.steer(run, latent, pole)

"""All latents of an SAE: one search box, filters, and a reading mode that walks through what was found."""

import loaders
import session
import streamlit as st
from parts import latent as latent_parts
from parts import reading, results
from parts import search as search_parts
from parts import source as source_parts

from saelab.workspace.notes import read_notes

SOURCES = ("words", "density", "max", "token_entropy", "label", "label_score", "label_mass", "promoted_logits")

run = session.need_run()
index = loaders.need_index(run, "Features")
table = loaders.catalogue(run)
signed = len(index.poles) > 1

with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
    st.title("Features", anchor=False)
    with st.container(horizontal=True, width="content"):
        reading.history("features_history")
        source_parts.of_index(run, index, SOURCES)
asked = search_parts.box(table, signed)

if asked.everywhere:
    search_parts.everywhere(asked)
    st.stop()

if asked.query.kind == "text":
    found = search_parts.by_text(run, index, table, asked)
else:
    found = search_parts.results(run, asked)

own, at = read_notes(loaders.place(run)), f"{asked.key}_{run.name}"
every, found = found, found.head(results.SHOWN)
keys = list(zip(found["latent"].tolist(), found["pole"].tolist()))
left, right = st.columns([3, 2], gap="medium")
with right:
    place = reading.walk(keys, own, at)
    if not keys:
        st.caption("No latent that fits fires on the marks." if asked.query.kind == "text" else "No latent fits.")
    else:
        reading.actions(run, *keys[place], key="features_preview")
        latent_parts.preview(run, index, *keys[place], key="features_shown", opens=False)
with left:
    if not keys:
        pass
    elif asked.query.kind == "text":
        results.matches(found, signed, key=at)
    else:
        results.latents(found, signed, own, key=at)
    if keys:
        results.download(every, run.name, key=f"{at}_csv")

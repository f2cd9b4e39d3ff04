"""Collections: named sets of latents with notes, to read, steer, ablate, compare across SAEs, and export."""

import json

import loaders
import pandas as pd
import session
import streamlit as st
from parts import collections as parts

from saelab import viz
from saelab.workspace import collections

st.title("Collections", anchor=False)
workspace = loaders.workspace()
known = collections.read_collections(workspace.root)
if not known:
    st.info(
        "There is no collection in this folder yet. On the Features page, the key B puts a latent into the bookmarks; "
        "a latent's page puts it into any collection.",
        icon=":material/info:",
    )
    st.stop()
session.say_unknown("collection", known)
name = st.selectbox(
    "collection", list(known), format_func=viz.visible, **session.held("collection", next(iter(known)), viz.visible)
)
chosen = known[name]
rows = collections.rows(chosen, workspace.runs)
frame = pd.DataFrame(rows)
picked = parts.members(frame, name)
members = [chosen.members[place] for place in picked] or list(chosen.members)
st.caption(f"{len(chosen.members)} latents" + (f", {len(picked)} chosen" if picked else ""))
with st.container(horizontal=True, vertical_alignment="bottom"):
    parts.send(members)
    st.download_button("CSV", frame.to_csv(index=False), f"{name}.csv", "text/csv", on_click="ignore", key="c_csv")
    text = json.dumps({"name": name, "note": chosen.note, "members": rows}, indent=2, default=str)
    st.download_button("JSON", text, f"{name}.json", "application/json", on_click="ignore", key="c_json")
    parts.change(chosen, members if picked else [])
parts.across(members)

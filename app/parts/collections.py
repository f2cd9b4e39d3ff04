"""Pieces of the Collections page."""

from __future__ import annotations

from typing import Any

import loaders
import pandas as pd
import session
import streamlit as st

from parts import results
from saelab import viz
from saelab.errors import UserError
from saelab.features.search import counterparts
from saelab.runs import Run
from saelab.workspace import collections
from saelab.workspace.collections import Collection, Member
from saelab.workspace.relatives import relatives

TEXTS = ("run", "my label", "label", "words", "note")


def members(frame: pd.DataFrame, name: str) -> list[int]:
    """The table of a collection; the places of the rows that are chosen."""
    if frame.empty:
        st.caption("The collection is empty.")
        return []
    view = frame.copy()
    for column in view.columns.intersection(TEXTS):
        view[column] = view[column].fillna("").map(viz.visible)
    if "label" in view:
        view["label"] = results.about(frame)
    event = st.dataframe(
        view,
        hide_index=True,
        column_config={name: results.COLUMNS[name] for name in view.columns if name in results.COLUMNS},
        on_select="rerun",
        selection_mode="multi-row",
        key=f"collection_{name}",
        alt="The latents of the collection; choose rows to act on those alone",
    )
    return [place for place in event.selection.rows if place < len(frame)]


def send(chosen: list[Member]) -> None:
    """Open a latent, or put latents on the steering bench: to add them, or to ablate them."""
    runs = loaders.workspace().runs
    there = [member for member in chosen if member.run in runs and runs[member.run].has_weights]
    one = len({member.run for member in there}) == 1
    if len(chosen) == 1 and there and st.button("Open", key="c_open", icon=":material/open_in_new:"):
        session.open_latent(there[0].latent, there[0].pole, runs[there[0].run])
    why = None if one else "A bench holds latents of one SAE: choose rows of one."
    for text, operation, icon in (("Steer", "add", "tune"), ("Ablate", "ablate", "block")):
        if st.button(text, key=f"c_{operation}", icon=f":material/{icon}:", disabled=not one, help=why):
            session.steer_all(runs[there[0].run], [(m.latent, m.pole) for m in there], operation)


def change(chosen: Collection, picked: list[Member]) -> None:
    """Note, removal of members, removal of the collection."""
    if loaders.read_only():
        return
    root = loaders.workspace().root
    if picked and st.button("Remove from it", key="c_remove", icon=":material/playlist_remove:"):
        collections.remove(root, chosen.name, picked)
        st.rerun()
    with st.popover("Edit", icon=":material/edit:"):
        note = st.text_area("Note", chosen.note, key=f"c_note_{chosen.name}")
        if st.button("Save the note", key="c_save"):
            collections.describe(root, chosen.name, note)
            st.rerun()
        if st.button("Delete the collection", key="c_delete", icon=":material/delete:"):
            collections.delete(root, chosen.name)
            st.rerun()
    if chosen.note:
        st.caption(viz.markdown(chosen.note))


def add_form(run: Run, latent: int, pole: int) -> None:
    """Put a latent into a collection, old or new, with a note."""
    if loaders.read_only():
        return
    root = loaders.workspace().root
    known = collections.read_collections(root)
    within = [c.name for c in known.values() if any(m.key == (run.name, latent, pole) for m in c.members)]
    with st.popover("Collect" + (f" ({len(within)})" if within else ""), icon=":material/bookmark:"):
        if within:
            st.caption("in " + ", ".join(viz.markdown(name) for name in within))
        with st.form(f"collect_{latent}_{pole}", border=False):
            names = list(known) or [collections.BOOKMARKS]
            name = st.selectbox("collection", names, accept_new_options=True, key=f"collect_name_{latent}_{pole}")
            note = st.text_input("why", key=f"collect_why_{latent}_{pole}")
            if st.form_submit_button("Add", icon=":material/add:"):
                collections.add(root, str(name), [Member(run.name, latent, pole, note.strip())])
                st.rerun()


@st.cache_data(max_entries=64, show_spinner="Looking in the other SAEs …")
def _across(key: Any, _chosen: list[Member], _others: dict[str, Run]) -> list[dict[str, Any]]:
    runs, found = loaders.workspace().runs, []
    for member in _chosen:
        own = loaders.sae(runs[member.run])
        direction = own.W_dec[member.latent].detach() * member.pole
        # A transcoder's rows lie where it writes: they compare with those of transcoders between the same places alone.
        near = counterparts(direction, {n: loaders.sae(r) for n, r in relatives(runs[member.run], _others).items()})
        row: dict[str, Any] = {"SAE": member.run, "latent": member.latent, "pole": member.pole}
        for name, (latent, cosine) in near.items():
            row |= {name: f"#{latent} {cosine:+.2f}"}
        found.append(row)
    return found


def across(chosen: list[Member]) -> None:
    """The closest latents in the other SAEs of the folder that read the same activations, when asked for."""
    runs = loaders.workspace().runs
    there = [member for member in chosen if member.run in runs and runs[member.run].has_weights]
    if not there:
        return
    hooks = {runs[member.run].metadata.get("hook_name") for member in there}
    others = {n: r for n, r in runs.items() if r.has_weights and r.metadata.get("hook_name") in hooks}
    if len(others) < 2 or not st.toggle("Compare across SAEs", help=ACROSS, **session.held("c_across", False)):
        return
    key = (tuple(m.key for m in there), tuple((name, run.stamp) for name, run in others.items()))
    try:
        table = pd.DataFrame(_across(key, there, others))
    except UserError as error:
        st.caption(viz.markdown(str(error)))
        return
    table.columns = [viz.visible(name) for name in table.columns]
    st.dataframe(table, hide_index=True, placeholder="–", alt="Closest latents in other SAEs, with their cosines")


ACROSS = (
    "The latent of each other SAE whose decoder row is closest, and the cosine. SAEs of the same seed began with the "
    "same directions, so that a high cosine between them proves little."
)

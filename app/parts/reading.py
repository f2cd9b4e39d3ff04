"""Reading mode: walk through a list of latents by keys, and note, rate or collect what is in front of one."""

from __future__ import annotations

from collections.abc import Sequence

import loaders
import session
import streamlit as st

from saelab import viz
from saelab.runs import Run
from saelab.workspace import collections
from saelab.workspace.collections import BOOKMARKS, Member
from saelab.workspace.notes import rate, read_notes, write_note

AT = "at"  # the row of the list that is shown, counted from 1: a field, and part of the address
REMEMBERED = 20
HELP = (
    "Keys: ↑ ↓ walk through the list, N goes to the next latent without a label of yours, L writes a label, "
    "B puts the latent into the bookmarks, 1 to 5 rate it, O opens its page."
)


def walk(keys: Sequence[tuple[int, int]], own: dict[int, dict[str, str]], table: str) -> int:
    """The buttons that walk through ``keys``; returns the place in it that is shown. ``table`` is the table's key."""
    last = max(len(keys), 1)
    if not 1 <= int(st.session_state.get(AT) or 1) <= last:
        st.session_state[AT] = 1
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.button("Prev", key="read_up", shortcut="Up", on_click=_step, args=(-1, last, table))
        st.button("Next", key="read_down", shortcut="Down", on_click=_step, args=(1, last, table))
        st.button("Unlabelled", key="read_new", shortcut="N", on_click=_unlabelled, args=(keys, own, table))
        st.number_input("row", 1, last, width=90, help=HELP, **session.held(AT, 1))
    return int(st.session_state[AT]) - 1


def choose(place: int, table: str) -> None:
    """Show a place of the list, in the table too."""
    st.session_state[AT] = place + 1
    st.session_state[table] = {"selection": {"rows": [place], "columns": [], "cells": []}}


def clicked(table: str) -> None:
    """Show the row of the table that was clicked."""
    chosen = st.session_state[table]["selection"]
    rows = [*chosen["rows"], *(cell[0] for cell in chosen["cells"])]
    if rows:
        st.session_state[AT] = int(rows[0]) + 1


def _step(by: int, last: int, table: str) -> None:
    choose(min(max(int(st.session_state[AT]) + by, 1), last) - 1, table)


def _unlabelled(keys: Sequence[tuple[int, int]], own: dict[int, dict[str, str]], table: str) -> None:
    now = int(st.session_state[AT])
    for place in [*range(now, len(keys)), *range(now)]:
        if not own.get(keys[place][0], {}).get("label"):
            return choose(place, table)
    st.toast("Every latent of the list has a label of yours.")
    return None


def actions(run: Run, latent: int, pole: int, key: str) -> None:
    """Label, bookmark, rating, page: each with its key."""
    note = read_notes(loaders.place(run)).get(latent, {})
    member = Member(run.name, latent, pole)
    kept = collections.read_collections(loaders.workspace().root)
    marked = any(m.key == member.key for m in kept[BOOKMARKS].members) if BOOKMARKS in kept else False
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Open", key=f"{key}_open", shortcut="O"):
            session.open_latent(latent, pole, run)
        if not loaders.read_only():
            if st.button("Label", key=f"{key}_label", shortcut="L", icon=":material/edit:"):
                label_dialog(run, latent)
            mark = ":material/bookmark_remove:" if marked else ":material/bookmark:"
            st.button("Bookmark", key=f"{key}_mark", shortcut="B", icon=mark, on_click=_mark, args=(member, marked))
            stars = int(note.get("rating") or 0)
            for number in range(1, 6):
                star = ":material/star:" if number <= stars else ":material/star_outline:"
                wanted = 0 if number == stars else number  # the same once more takes it back
                place = loaders.place(run)
                name, help = f"{key}_rate_{number}", f"rate it {number} of 5"
                st.button(star, key=name, help=help, shortcut=str(number), on_click=rate, args=(place, latent, wanted))


def _mark(member: Member, marked: bool) -> None:
    change = collections.remove if marked else collections.add
    change(loaders.workspace().root, BOOKMARKS, [member])


@st.dialog("My label")
def label_dialog(run: Run, latent: int) -> None:
    """A label and a note for one latent."""
    known = read_notes(loaders.place(run)).get(latent, {})
    with st.form(f"dialog_{latent}", border=False):
        label = st.text_input(f"Label of #{latent}", value=known.get("label", ""))
        note = st.text_area("Note", value=known.get("note", ""), height=90)
        if st.form_submit_button("Save", icon=":material/save:"):
            write_note(loaders.place(run), latent, label, note)
            st.rerun()


def visited(run: Run, latent: int, pole: int, title: str) -> None:
    """Remember that this session has seen a latent's page."""
    seen: dict[tuple[str, int, int], str] = st.session_state.setdefault("visited", {})
    seen.pop((run.name, latent, pole), None)
    seen[run.name, latent, pole] = title
    for old in list(seen)[:-REMEMBERED]:
        del seen[old]


def history(key: str) -> None:
    """The latents that this session has seen, the last first; a click opens one."""
    seen: dict[tuple[str, int, int], str] = st.session_state.get("visited", {})
    with st.popover("History", icon=":material/history:"):
        if not seen:
            st.caption("No latent was opened yet.")
        for place, ((name, latent, pole), title) in enumerate(reversed(seen.items())):
            run = loaders.workspace().runs.get(name)
            if run is not None and st.button(f"{viz.markdown(name)} {title}", key=f"{key}_{place}", type="tertiary"):
                session.open_latent(latent, pole, run)

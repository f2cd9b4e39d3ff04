"""Saved recipes: save the interventions of the Steering page, and load a recipe into it."""

from __future__ import annotations

from typing import Any

import loaders
import pandas as pd
import streamlit as st

from parts import doses as dose_parts
from parts import steering as steering_parts
from parts import tables
from saelab import viz
from saelab.runs import Run
from saelab.steering import Recipe
from saelab.workspace import recipes as saved
from saelab.workspace import steering
from saelab.workspace.steering import Pick

TEXTS = ("name", "does", "strength", "origin", "promotes", "model", "verdict")


def asked_name(form: str, label: str, key: str) -> str | None:
    """The name of a recipe that is to be saved; None while nothing is asked, and in an app that only reads."""
    if loaders.read_only():
        st.caption("Recipes cannot be saved: this app was started with --read-only.")
        return None
    with st.form(form, border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.text_input(label, key=key, placeholder="name")
        asked = st.form_submit_button("Save", icon=":material/save:")
    return name if asked else None


def save(run: Run, source: Any, model: Any, found: list[Pick], prompt: str) -> None:
    """The interventions of the page as a recipe in the folder."""
    name = asked_name("steering_save", "Save as a recipe", "recipe_name")
    if name is None:
        return
    folder = saved.recipe_folder(loaders.workspace().root, name)
    last = dose_parts.held()
    promotes = [token for pick in found for token in steering_parts.promoted(run, model, pick)]
    of = None if last is None else next((p.label for p in found if steering.same_vector(p, last.pick)), None)
    about = saved.provenance(found, prompt, promotes)
    if last is not None and of is not None:
        about |= saved.measured(last.found, of, last.words)
    with loaders.model_lock(), st.spinner("Saving …"):
        steps = [step for p in found for step in steering.interventions(p, source, model)]
        recipe = Recipe.of(model, steps, name=name.strip(), provenance=about)
        recipe.save(folder)
    st.toast(f"Saved {folder.name}", icon=":material/check:")
    st.rerun()  # the table of recipes was drawn before


def show(run: Run) -> None:
    """Every recipe of the folder; the chosen one with its dose-response curves, and a button that loads it."""
    root = loaders.workspace().root
    rows = saved.saved_recipes(root)
    if not rows:
        st.caption(f"Saved recipes appear here; they lie in `{viz.visible(root.name)}/{saved.RECIPES}`.")
        return
    view = pd.DataFrame([{k: v for k, v in row.items() if k not in {"doses", "folder"}} for row in rows])
    for name in view.columns.intersection(TEXTS):
        view[name] = view[name].fillna("").map(viz.visible)
    event = st.dataframe(
        view,
        hide_index=True,
        column_config={"norm": st.column_config.NumberColumn("norm", format="%.3f", help="of the first vector")},
        on_select="rerun",
        selection_mode=tables.CLICK,
        key="recipe_table",
        placeholder="–",
        alt="Saved recipes",
    )
    row = tables.picked_row(event, rows)
    if row is None:
        st.caption("Click a recipe to see its doses and responses, or to load it.")
        return
    if st.button("Load this recipe", key="recipe_reopen", icon=":material/open_in_full:"):
        st.session_state["steer_recipe"] = (run.name, row["folder"])
        st.toast(f"Loaded {row['name']}", icon=":material/check:")
        st.rerun()
    if row.get("doses"):
        dose_parts.dose_charts(row["doses"], "recipe")
    else:
        st.caption("This recipe was saved without measured doses.")

"""Pieces of the Steering page. Everything that touches the model holds its lock."""

from __future__ import annotations

import math
from typing import Any

import loaders
import page
import session
import streamlit as st

from parts import latent as latent_parts
from parts import limits, trial
from saelab import viz
from saelab.errors import UserError
from saelab.runs import Run
from saelab.steering import OPERATIONS, difference_of_means
from saelab.workspace import recipes, steering
from saelab.workspace.picks import pick_text, read_picks, renewed
from saelab.workspace.steering import Pick

PLACES = {
    "all": "all tokens",
    "prompt": "prompt",
    "generated": "generated",
    "answer": "answers of a chat",
    "instruction": "user's messages of a chat",
}


OF_CHATS = ("answer", "instruction")


def talks(model: Any) -> bool:
    """Whether the model's tokenizer has a template for chats."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def picks(run: Run, source: Any) -> list[Pick]:
    """This session's picks for this run, including those of a link, and a latent or a recipe that a page sent."""
    found: list[Pick] = st.session_state.setdefault("steering_picks", {}).setdefault(run.name, [])
    _renew(run, source, found)
    asked = st.query_params.get_all("pick")
    name, written = st.session_state.get("steering_address", (None, []))
    if asked != written and (asked or name == run.name):
        # Of a link, or of a step back: vectors, which an address cannot hold, stay.
        st.session_state["steering_address"] = (run.name, asked)
        found[:] = [*read_picks(asked, source), *(pick for pick in found if pick_text(pick) is None)]
        for pick in found:
            _show(pick)
    sent = st.session_state.pop("steer_pick", None)
    if sent is not None and sent[0] == run.name:
        _put(found, steering.pick_latent(source, sent[1], sent[2]))
    several = st.session_state.pop("steer_picks", None)
    if several is not None and several[0] == run.name:
        for latent, pole in several[1]:
            _put(found, steering.pick_latent(source, latent, pole).changed(operation=several[2]))
    taken = st.session_state.pop("steer_recipe", None)
    if taken is not None and taken[0] == run.name:
        root = loaders.workspace().root
        for pick in recipes.reopen(root, taken[1], source):
            _put(found, pick)
        if prompt := recipes.saved_prompt(root, taken[1]):
            st.session_state["steering_prompt"] = prompt
    return found


def _renew(run: Run, source: Any, found: list[Pick]) -> None:
    """Take the directions of an SAE that was trained again from its files as they are now."""
    stamps: dict[str, Any] = st.session_state.setdefault("steering_stamps", {})
    if stamps.setdefault(run.name, run.stamp) == run.stamp:
        return
    stamps[run.name] = run.stamp
    for pick in list(found):
        try:
            found[found.index(pick)] = renewed(pick, source)
        except UserError as error:
            found.remove(pick)
            st.warning(viz.markdown(str(error)), icon=session.OUTDATED)


def share(run: Run, found: list[Pick]) -> None:
    """Write the picks into the address, and say which of them it cannot hold."""
    texts = [text for pick in found if (text := pick_text(pick)) is not None]
    st.session_state["steering_address"] = (run.name, texts)
    if st.query_params.get_all("pick") != texts:
        st.query_params["pick"] = texts
    if missing := [viz.markdown(pick.label) for pick in found if pick_text(pick) is None]:
        st.caption(f"A link to this page leaves out {', '.join(missing)}: save a recipe to share it.")


def _show(pick: Pick) -> None:
    """Have the widgets of a pick show what it says, whatever they showed before."""
    at = pick.label
    shown = {f"steering_do_{at}": pick.operation, f"steering_{pick.operation}_{at}": pick.amount}
    shown |= {f"steering_unit_{at}": pick.unit, f"steering_where_{at}": pick.where, **limits.shown(pick)}
    for key, value in shown.items():
        st.session_state[key] = value


def _put(found: list[Pick], pick: Pick) -> None:
    if pick.label not in {p.label for p in found}:
        found.append(pick)


def add_latent(run: Run, source: Any) -> None:
    """A latent by number."""
    with st.form("steering_latent", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        latent = st.number_input("latent", 0, source.sae.n_features - 1, 0, key="steering_latent_number", width=150)
        signed = source.sae.signed
        pole = st.segmented_control("pole", ["+", "−"], default="+", key="steering_pole") if signed else "+"
        if st.form_submit_button("Add", icon=":material/add:"):
            _put(
                st.session_state["steering_picks"][run.name],
                steering.pick_latent(source, int(latent), 1 if pole != "−" else -1),
            )


def add_means(run: Run, source: Any, model: Any) -> None:
    """A difference of means of two sets of texts: the baseline every latent is measured against."""
    with st.expander("Vector from two sets of texts"), st.form("steering_means", border=False):
        name = st.text_input("name", "means", **session.held_text("steering_means_name", "means"))
        positive = st.text_area(
            "texts with the concept, one a line", height=90, **session.held_text("steering_positive")
        )
        negative = st.text_area("texts without it, one a line", height=90, **session.held_text("steering_negative"))
        session.say_unshared("steering_means_name", "steering_positive", "steering_negative")
        if st.form_submit_button("Make the vector", icon=":material/add:"):
            with loaders.model_lock(), st.spinner("Reading the texts …"):
                vector = difference_of_means(model, source.hook_name_out, lines(positive), lines(negative))
            _put(st.session_state["steering_picks"][run.name], steering.pick_vector(vector, name.strip() or "means"))


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _effect(run: Run, model: Any, pick: Pick) -> None:
    """The tokens that the direction promotes, below its name."""
    tokens = promoted(run, model, pick)
    if tokens:
        page.html(viz.caption("promotes " + " ".join(f"‘{token}’" for token in tokens)))


def promoted(run: Run, model: Any, pick: Pick, count: int = 5) -> list[str]:
    """Tokens whose logits a pick raises most: the index's, or the model's own answer for any other direction."""
    if pick.latent is not None and run.has_index:
        row = loaders.need_index(run).latent(pick.latent, pick.pole)
        if row["promoted"]:
            return row["promoted"][:count]
    return loaders.promoted(model, pick.vector.direction, count)


def edit(run: Run, source: Any, model: Any, found: list[Pick]) -> list[Pick]:
    """Operation, amount and unit of each pick; returns the picks as edited."""
    for i, pick in enumerate(list(found)):
        with st.container(border=True):
            with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
                st.markdown(f"**{viz.markdown(named(run, pick))}**")
                if st.button("Remove", key=f"steering_remove_{pick.label}", icon=":material/close:", type="tertiary"):
                    found.pop(i)
                    st.rerun()
            _effect(run, model, pick)
            with st.container(horizontal=True, vertical_alignment="bottom"):
                pick = _place(_operation_and_amount(pick), model)
                pick = limits.edit(run, source, model, pick)
            for limit in steering.limits(pick):
                page.html(viz.caption(limit))
            if size := steering.size(pick):
                page.html(viz.caption(size))
            if pick.note and pick.amount == pick.start and pick.operation == "add":
                page.html(viz.caption(pick.note))
            found[i] = pick
    return found


def named(run: Run, pick: Pick, longest: int = 60) -> str:
    """A pick with the label of its latent: the researcher's own, an imported one, or the index's."""
    if pick.latent is None:
        return pick.label
    label = latent_parts.names(run).get(pick.latent, {}).get("label")
    if label is None and run.has_index:
        label = loaders.need_index(run).latent(pick.latent, pick.pole).get("label")
    label = label or ""
    return f"{pick.label} · {label[:longest]}{'…' * (len(label) > longest)}" if label else pick.label


def calibrate_new(run: Run, source: Any, model: Any, found: list[Pick]) -> None:
    """Give each pick that was added on this page a strength that does moderate damage, instead of a guess."""
    again = st.session_state.pop("steering_calibrate", None)
    for i, pick in enumerate(found):
        if pick.label == again:
            with page.part():
                found[i] = limits.calibrated(run, source, model, pick)
                _show(found[i])
            continue
        if pick.operation != "add" or pick.start is not None or pick.note:
            continue
        try:
            (strength,) = trial.calibrated(model, pick.vector, (trial.DEFAULT,))
            found[i] = steering.calibrated(pick, strength)
        except UserError as error:
            found[i] = pick.changed(note=f"not calibrated: {error}")


def _place(pick: Pick, model: Any) -> Pick:
    """The tokens that a pick acts on; positions and functions of a recipe stay as they are."""
    if not isinstance(pick.where, str):
        return pick
    held, chats = (pick.where, st.session_state.get(key := f"steering_where_{pick.label}")), talks(model)
    names = [name for name in PLACES if chats or name not in OF_CHATS or name in held]
    st.session_state.setdefault(key, pick.where)
    where = st.selectbox("on", names, format_func=PLACES.__getitem__, key=key, width=170)
    return pick.changed(where=where)


def _operation_and_amount(pick: Pick) -> Pick:
    known = steering.operations(pick)
    summaries = "\n".join(f"- {name}: {OPERATIONS[name].summary()}" for name in known)
    # Not as the widgets' defaults: what a link or a recipe brings has been set by now, and both would be a conflict.
    st.session_state.setdefault(key := f"steering_do_{pick.label}", pick.operation)
    operation = st.selectbox("do", known, key=key, width=140, help=summaries)
    amount = OPERATIONS[operation].amount
    if amount is None:
        return pick.changed(operation=operation)
    # The slider leaves room beyond the amount of a loaded recipe.
    largest = amount.largest if pick.start is None else max(amount.largest, 2 * abs(pick.start))
    least, number = -largest if amount.signed else 0.0, amount.default
    if operation == pick.operation:
        # The settings are kept while another page is visited.
        number = min(max(pick.amount, least), largest)
    # A calibrated amount has three digits.
    step = amount.step if not pick.start else min(amount.step, 10.0 ** (math.floor(math.log10(abs(pick.start))) - 2))
    st.session_state.setdefault(key := f"steering_{operation}_{pick.label}", number)
    number = st.slider(amount.title, least, largest, step=step, key=key, format="%.3g")
    unit = pick.unit
    if amount.units:
        units = steering.units(pick)
        key = f"steering_unit_{pick.label}"
        st.session_state.setdefault(key, unit)
        unit = st.selectbox("unit", units, format_func=steering.UNITS.__getitem__, key=key, width=200)
    return pick.changed(operation=operation, amount=number, unit=unit)

"""A latent or vector tried at three calibrated strengths beside the unsteered model and a random control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import loaders
import page
import session
import streamlit as st

from saelab import viz
from saelab.errors import UserError
from saelab.lm.tokens import written_text
from saelab.runs import Run
from saelab.steering import Add, Calibration, SteeringVector, calibrate_each
from saelab.steering.directions import random_direction
from saelab.steering.measure.budget import strength_at
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.neutral import NEUTRAL
from saelab.workspace import steering
from saelab.workspace.steering import Pick
from saelab.workspace.trial import Beginning, Text, budget_name

BUDGETS = (0.1, 0.3, 1.0)  # nats per token
DEFAULT = 0.3
EXAMPLE = "The weather today"


@st.cache_data(max_entries=512, show_spinner=False)
def _calibrated(
    model: tuple[str, ...], key: bytes, budgets: tuple[float, ...], _vector: Any, _model: Any
) -> list[Calibration]:
    return calibrate_each(_model, _vector, NEUTRAL, budgets)


def calibrated(model: Any, vector: SteeringVector, budgets: tuple[float, ...] = BUDGETS) -> list[Calibration]:
    """The strengths at which a vector does so much damage on neutral texts; UserError where none does."""
    key = vector.direction.numpy().tobytes() + vector.hook_name.encode()
    with loaders.model_lock(), st.spinner("Calibrating the strength …"):
        return _calibrated(loaders.model_key(model), key, budgets, vector, model)


@st.cache_data(max_entries=512, show_spinner=False)
def _equal(model: tuple[str, ...], key: bytes, goal: float, start: float, _vector: Any, _model: Any) -> Any:
    baseline = UnsteeredBaseline(_model, NEUTRAL)

    def damage(strength: float) -> float:
        return baseline.measure(Add(_vector, strength)).mean_kl

    return strength_at(damage, goal, start, limit=64 * start)


def equally_damaging(model: Any, control: SteeringVector, other: Calibration) -> tuple[float, float, bool]:
    """The strength at which a vector does the damage of another at its own, the damage, and whether they are alike."""
    key = control.direction.numpy().tobytes() + control.hook_name.encode()
    with loaders.model_lock(), st.spinner("Calibrating the control …"):
        return _equal(loaders.model_key(model), key, other.damage, other.strength, control, model)


def panel(run: Run, source: Any, model: Any, pick: Pick, key: str) -> None:
    """A prompt continued at three strengths, beside the unsteered model and a random direction of the middle length."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        prompt = st.text_input("Prompt", EXAMPLE, **session.held_text("trial_prompt", EXAMPLE))
        length = st.number_input("new tokens", 1, 400, 30, width=120, **session.held("trial_length", 30))
        asked = st.button("Generate", key=f"trial_generate_{key}", icon=":material/play_arrow:", type="primary")
    state = f"trial_{key}"
    made_with = f"{pick.label}, “{prompt}”, {int(length)} tokens"
    if asked:
        try:
            texts = three_strengths(run, model, pick)
            st.session_state[state] = (run.name, run.stamp, made_with, texts)
            write(model, texts, [Beginning.of_text(model, prompt)] * len(texts), {"max_new_tokens": int(length)}, key)
            return
        except UserError as error:
            st.error(viz.markdown(str(error)), icon=":material/error:")
    name, stamp, before, texts = st.session_state.get(state, (None, (), "", []))
    if name == run.name:
        if before != made_with:
            st.caption(f"Made with {viz.markdown(before)}.")
        if stamp != run.stamp:
            st.warning(f"{session.CHANGED}. Generate again to see what it does now.", icon=session.OUTDATED)
        for text in texts:
            show(text, texts[0].tokens, model, stamp != run.stamp)


def three_strengths(run: Run, model: Any, pick: Pick) -> list[Text]:
    """The texts of a trial, still to be written."""
    # Budgets beyond the largest strength that is tried give the same one.
    found = list({one.strength: one for one in calibrated(model, pick.vector, BUDGETS)}.values())
    texts = [Text("unsteered", "the model as it is")]
    for one in found:
        texts.append(added(pick.vector, one.strength, budget_name(one), f"adds {pick.label}"))
    middle = found[len(found) // 2]
    control = random_direction(pick.vector, 0)
    strength, damage, reached = equally_damaging(model, control, middle)
    why = f"a random direction with the damage of {budget_name(middle)} on neutral texts"
    text = added(control, strength, "random control", why)
    alike = f"KL {damage:.3g} nats per token on neutral texts, where {budget_name(middle)} has {middle.damage:.3g}"
    text.note = alike if reached else f"not of equal damage: {alike}"
    return [*texts, text]


def added(vector: SteeringVector, strength: float, name: str, why: str) -> Text:
    return Text(name, f"{why}; length {strength:.3g} in raw units", [Add(vector, strength)])


def write(
    model: Any,
    texts: Sequence[Text],
    beginnings: Sequence[Beginning],
    options: dict[str, Any],
    key: str,
    places: Sequence[Any] | None = None,
    ready: Callable[[int], None] = lambda place: None,
) -> None:
    """Write the texts one after another, each token shown as it comes, with a button that stops.

    ``ready`` is called before each of them, when those before it are written. Any action of the user ends the run of
    the page at the next token; what is written by then stays.
    """
    stop = st.empty()
    stop.button("Stop", key=f"stop_{key}", icon=":material/stop:")
    places = places or [st.container() for _ in texts]
    with loaders.model_lock():
        for number, (place, text, beginning) in enumerate(zip(places, texts, beginnings)):
            with place:
                ready(number)
                slot = st.empty()
            steps = text.written(model, beginning, **options)
            try:
                for _ in steps:
                    with slot.container():
                        heading(text)
                        page.html(viz.text_block(written_text(model.tokenizer, text.tokens)))
            finally:
                steps.close()  # takes the hooks off the model
            with slot.container():
                show(text, texts[0].tokens, model)
    stop.empty()


def heading(text: Text) -> None:
    """The name of a text, with its damage where that is known."""
    said = [text.why]
    if text.damage is not None:
        kl = "" if text.name == "unsteered" else f"KL {text.damage.kl:.2f} nats per token here, "
        said.append(f"{kl}perplexity {text.damage.perplexity:.3g} under the unsteered model")
    elif text.stopped and text.tokens:
        said.append("not finished")
    if text.note:
        said.append(text.note)
    st.markdown(f"**{viz.markdown(text.name)}**", help=viz.markdown("; ".join(said)))
    page.html(viz.caption("; ".join(said[1:]) or "…"))


def show(text: Text, before: Sequence[int], model: Any, pale: bool = False) -> None:
    """A text with its damage; tokens that the unsteered text does not have are marked."""
    heading(text)
    if text.stopped:
        strip = viz.text_block(written_text(model.tokenizer, text.tokens))
    else:
        marks = [0.0] * len(text.tokens) if text.name == "unsteered" else steering.changed(before, text.tokens)
        strip = viz.token_strip(text.strings, [0.55 * m for m in marks], page.colours(), 1.0, unit="changed")
    page.html(viz.outdated(strip) if pale else strip)

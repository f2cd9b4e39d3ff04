"""What the model says on the Steering page: a text continued, or a chat of several turns, under every variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import page
import session
import streamlit as st

from parts import steering as steering_parts
from parts import trial
from saelab import viz
from saelab.errors import UserError
from saelab.lm.tokens import written_text
from saelab.runs import Run
from saelab.workspace import steering
from saelab.workspace.steering import Pick
from saelab.workspace.trial import Beginning, Text

FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
USUAL = [0.5, 1.0, 2.0]
EXAMPLE = "The weather today"
Variant = list[tuple[str, Text]]  # a message of the user, and the answer to it


def section(run: Run, source: Any, model: Any, picks: list[Pick]) -> str:
    """The prompt's form, and what is written; returns the prompt."""
    kind = "text"
    if steering_parts.talks(model):
        kind = st.segmented_control(
            "Prompt as", ["text", "chat"], default="text", **session.held("steering_kind", "text")
        )
    chat = kind == "chat"
    system = st.text_input("System prompt", **session.held_text("steering_system")) if chat else ""
    with st.form("steering_form", border=False):
        title = "Message" if chat else "Prompt"
        prompt = st.text_area(title, EXAMPLE, height=70, **session.held_text("steering_prompt", EXAMPLE))
        factors = st.pills(
            "strengths, as multiples of those on the left",
            FACTORS,
            selection_mode="multi",
            default=USUAL,
            format_func=times,
            **session.held("steering_factors", USUAL, times),
        )
        with st.container(horizontal=True, vertical_alignment="bottom"):
            length = st.number_input("new tokens", 1, 400, 40, width=130, **session.held("steering_length", 40))
            temperature = st.number_input(
                "temperature", 0.0, 2.0, 0.0, 0.1, width=130, **session.held("steering_temperature", 0.0)
            )
            seed = st.number_input("seed", 0, 10_000, 0, width=110, **session.held("steering_seed", 0))
            asked = st.form_submit_button("Generate", icon=":material/play_arrow:", type="primary", disabled=not picks)
    session.say_unshared("steering_prompt", *(["steering_system"] if chat else []))
    if not picks:
        st.caption("Pick a latent, or make a vector from two sets of texts.")
    options = {"max_new_tokens": int(length), "temperature": float(temperature), "seed": int(seed)}
    now = steering.described(picks, prompt, options) + (f" · chat, system “{system.strip()}”" if chat else "")
    if chat and st.button("New chat", key="steering_new_chat", icon=":material/restart_alt:", type="tertiary"):
        st.session_state.pop("steering_talk", None)
    held = st.session_state.get("steering_talk")
    before: dict[str, Variant] = held["variants"] if held and held["run"] == run.name and held["chat"] and chat else {}
    if not (asked and picks):
        if held and held["run"] == run.name and held["chat"] == chat:
            show(held["variants"], held["made_with"], outdated(held, now, run), model)
        return prompt
    variants = extended(before, made(picks, source, model, sorted(factors or [1.0])), prompt)
    made_with = {"run": run.name, "stamp": run.stamp, "made_with": now, "chat": chat}
    st.session_state["steering_talk"] = {**made_with, "variants": variants}
    try:
        beginnings = [beginning(model, turns, system if chat else None) for turns in variants.values()]
        st.caption(f"Made with {viz.markdown(now)}")
        write(model, variants, beginnings, options)
    except UserError as error:
        for turns in variants.values():  # the chat is as it was before the message
            turns.pop()
        st.error(viz.markdown(str(error)), icon=":material/error:")
    return prompt


def outdated(held: dict[str, Any], now: str, run: Run) -> str:
    """Why a talk is not what the page would write now; empty where it is."""
    if held["stamp"] != run.stamp:
        return f"{session.CHANGED}. Generate again to see what it does now."
    return "" if held["made_with"] == now else "The settings have changed since. Generate again to see what they do."


def times(factor: float) -> str:
    return f"×{factor:g}"


def made(picks: Sequence[Pick], source: Any, model: Any, factors: Sequence[float]) -> list[Text]:
    """The variants to write: unsteered, at each strength, and the same changes along random directions."""
    steps = [step for pick in picks for step in steering.interventions(pick, source, model)]
    texts = [Text("unsteered", "the model as it is, with the same seed")]
    for factor in factors:
        why = f"every change on the left, times {factor:g}"
        texts.append(Text(f"steered ×{factor:g}", why, [step.times(factor) for step in steps]))
    controls = []
    for i, pick in enumerate(picks):
        controls += steering.spread(steering.control(pick, seed=i), pick, model)
    why = "the same changes along random directions: vectors of equal length added, or projected out"
    return [*texts, Text("random control", why, controls)]


def extended(before: dict[str, Variant], texts: Sequence[Text], message: str) -> dict[str, Variant]:
    """The variants with one turn more; a strength that is new begins with what the unsteered model said."""
    started = before.get("unsteered", [])
    return {text.name: [*before.get(text.name, started), (message, text)] for text in texts}


def beginning(model: Any, turns: Variant, system: str | None) -> Beginning:
    """What a variant's last text follows: the prompt, or the chat so far where ``system`` is not None."""
    if system is None:
        return Beginning.of_text(model, turns[-1][0])
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for message, text in turns[:-1]:
        messages += [{"role": "user", "content": message}, {"role": "assistant", "content": said(model, text)}]
    return Beginning.of_chat(model, [*messages, {"role": "user", "content": turns[-1][0]}])


def said(model: Any, text: Text) -> str:
    return written_text(model.tokenizer, text.tokens)


def write(model: Any, variants: dict[str, Variant], beginnings: Sequence[Beginning], options: dict[str, Any]) -> None:
    """Write the last text of each variant below its earlier turns."""
    stop = st.container()
    places = []
    for turns in variants.values():
        with st.container(border=True):
            earlier(turns, model)
            places.append(st.container())
    with stop:
        trial.write(model, [turns[-1][1] for turns in variants.values()], beginnings, options, "steering", places)
    st.caption(MARKED)


MARKED = (
    "Marked: tokens that are not in the longest runs shared with the unsteered text. The random control has the "
    "lengths of ×1, not its damage, which can be more or less: compare their KL."
)


def earlier(turns: Variant, model: Any, pale: bool = False) -> None:
    """The turns of a chat before the last, and the message that it answers."""
    if len(turns) < 2:
        return
    for message, text in turns[:-1]:
        _message("user", message, pale)
        _message("assistant", said(model, text), pale)
    _message("user", turns[-1][0], pale)


def _message(role: str, content: str, pale: bool) -> None:
    block = viz.caption(role) + viz.text_block(content)
    page.html(viz.outdated(block) if pale else block)


def show(variants: dict[str, Variant], made_with: str, changed: str, model: Any) -> None:
    """The texts with the settings that made them; pale where ``changed`` says why they would now be others."""
    st.caption(f"Made with {viz.markdown(made_with)}")
    if changed:
        st.warning(changed, icon=session.OUTDATED)
    unsteered = next(iter(variants.values()), [])
    for turns in variants.values():
        if not turns:
            continue
        with st.container(border=True):
            earlier(turns, model, bool(changed))
            trial.show(turns[-1][1], unsteered[-1][1].tokens, model, bool(changed))
    st.caption(MARKED)

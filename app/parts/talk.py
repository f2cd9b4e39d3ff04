"""What the model says on the Steering page: a text continued, or a chat of several turns, under every variant."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import loaders
import page
import session
import streamlit as st

from parts import steering as steering_parts
from parts import trial
from saelab import viz
from saelab.data.chat import TEMPLATE
from saelab.errors import UserError
from saelab.lm.tokens import decode_each, written_text
from saelab.runs import Run
from saelab.steering import Intervention
from saelab.steering.measure.control import random_controls
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.silent import explained
from saelab.workspace import steering
from saelab.workspace.steering import Pick
from saelab.workspace.trial import Beginning, Text

FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
USUAL = [0.5, 1.0, 2.0]
EXAMPLE = "The weather today"
CONTROL = "random control"
Variant = list[tuple[str, Text]]  # a message of the user, and the answer to it


class Asked(NamedTuple):
    """What stands in the form, and whether it was sent."""

    prompt: str
    factors: list[float]
    options: dict[str, Any]  # of the sampling
    sent: bool


def section(run: Run, source: Any, model: Any, picks: list[Pick]) -> str:
    """The prompt's form, and what is written; returns the prompt."""
    chat = as_chat(model)
    system = st.text_input("System prompt", **session.held_text("steering_system")) if chat else ""
    form = ask(picks, chat)
    prompt, options = form.prompt, form.options
    now = (
        steering.described(picks, prompt, options)
        + " · chat" * chat
        + (f", system “{system.strip()}”" if system.strip() else "")
    )
    if chat and st.button("New chat", key="steering_new_chat", icon=":material/restart_alt:", type="tertiary"):
        st.session_state.pop("steering_talk", None)
    if chat:
        # What is wrong with a message that was sent is said where the texts would stand.
        with contextlib.suppress(UserError) if form.sent else page.part():
            show_read(model, run, prompt, system)
    held = st.session_state.get("steering_talk")
    before: dict[str, Variant] = held["variants"] if held and held["run"] == run.name and held["chat"] and chat else {}
    if not form.sent:
        if held and held["run"] == run.name and held["chat"] == chat:
            show(held["variants"], held["made_with"], outdated(held, now, run), model)
            say_silent(held.get("idle", []))
        return prompt
    variants = extended(before, made(picks, source, model, form.factors), prompt)
    made_with = {"run": run.name, "stamp": run.stamp, "made_with": now, "chat": chat}
    st.session_state["steering_talk"] = {**made_with, "variants": variants}
    try:
        beginnings = [beginning(model, turns, system if chat else None) for turns in variants.values()]
        st.caption(f"Made with {viz.markdown(now)}")
        write(model, variants, beginnings, options, steps := changes(picks, source, model))
        st.session_state["steering_talk"]["idle"] = idle = silent(model, steps, variants, beginnings)
        say_silent(idle)
    except UserError as error:
        for turns in variants.values():  # the chat is as it was before the message
            turns.pop()
        st.error(viz.markdown(str(error)), icon=":material/error:")
    return prompt


def ask(picks: list[Pick], chat: bool) -> Asked:
    """The form of the prompt."""
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
    return Asked(prompt, sorted(factors or [1.0]), options, asked and bool(picks))


def as_chat(model: Any) -> bool:
    """Whether the prompt is a message of a chat; a line says so where the model has no template for one."""
    if steering_parts.talks(model):
        kinds = ["text", "chat"]
        return (
            st.segmented_control("Prompt as", kinds, default="text", **session.held("steering_kind", "text")) == "chat"
        )
    asked = "chat" in st.query_params.get_all("steering_kind")
    said = (
        "The tokenizer of this model has no chat template, so a prompt is a text to continue and no message of a chat."
    )
    if asked:
        st.warning(f"This address asks for a chat. {said}", icon=":material/link_off:")
    else:
        st.caption(said)
    return False


def show_read(model: Any, run: Run, prompt: str, system: str) -> None:
    """The tokens of the chat as the model reads it before it answers, in the unsteered variant."""
    held = st.session_state.get("steering_talk")
    turns: Variant = held["variants"]["unsteered"] if held and held["run"] == run.name and held["chat"] else []
    if turns and turns[-1][0] == prompt:  # it has been answered
        turns = turns[:-1]
    found = beginning(model, [*turns, (prompt, Text("", ""))], system)
    with st.expander(f"What the model reads: {len(found.ids):,} tokens"):
        inside = [float(role > TEMPLATE) for role in found.roles or []]
        strings = decode_each(model.tokenizer, found.ids)
        page.html(
            viz.token_strip(strings, [0.4 * mark for mark in inside], page.colours(), 1.0, unit="message", breaks=True)
        )
        st.caption(
            "Tinted: what stands in messages. The rest is the model's chat template, with the beginning of its answer."
        )


def outdated(held: dict[str, Any], now: str, run: Run) -> str:
    """Why a talk is not what the page would write now; empty where it is."""
    if held["stamp"] != run.stamp:
        return f"{session.CHANGED}. Generate again to see what it does now."
    return "" if held["made_with"] == now else "The settings have changed since. Generate again to see what they do."


def times(factor: float) -> str:
    return f"×{factor:g}"


def changes(picks: Sequence[Pick], source: Any, model: Any) -> list[Intervention]:
    """What the picks do at their own strengths."""
    return [step for pick in picks for step in steering.interventions(pick, source, model)]


def made(picks: Sequence[Pick], source: Any, model: Any, factors: Sequence[float]) -> list[Text]:
    """The variants to write: unsteered, at each strength, and the same changes along random directions."""
    steps = changes(picks, source, model)
    texts = [Text("unsteered", "the model as it is, with the same seed")]
    for factor in factors:
        why = f"every change on the left, times {factor:g}"
        texts.append(Text(f"steered ×{factor:g}", why, [step.times(factor) for step in steps]))
    why = "the same changes along random directions, all multiplied by one number so that they do the damage of ×1"
    return [*texts, Text(CONTROL, why, random_controls(steps))]


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


def write(
    model: Any,
    variants: dict[str, Variant],
    beginnings: Sequence[Beginning],
    options: dict[str, Any],
    steered: Sequence[Intervention],
) -> None:
    """Write the last text of each variant below its earlier turns; the control does the damage of ``steered``."""
    stop = st.container()
    places = []
    for turns in variants.values():
        with st.container(border=True):
            earlier(turns, model)
            places.append(st.container())
    texts = [turns[-1][1] for turns in variants.values()]

    def ready(place: int) -> None:
        first = texts[0]
        if texts[place].name != CONTROL:
            return
        if first.tokens:
            texts[place].match(model, steered, Passage(beginnings[0].ids, first.tokens, beginnings[0].roles))
        else:
            texts[place].note = "the unsteered model wrote nothing on which damages could be compared"

    with stop:
        trial.write(model, texts, beginnings, options, "steering", places, ready)
    st.caption(MARKED)


def silent(
    model: Any, steps: Sequence[Intervention], variants: dict[str, Variant], beginnings: Sequence[Beginning]
) -> list[str]:
    """What of the changes did nothing on any of the texts, and why: a latent that is silent cannot be ablated."""
    texts = [turns[-1][1] for turns in variants.values()]
    read = [Passage(b.ids, text.tokens, b.roles) for b, text in zip(beginnings, texts) if text.name != CONTROL]
    with loaders.model_lock():
        return explained(model, steps, read)


def say_silent(lines: Sequence[str]) -> None:
    for line in lines:
        st.info(viz.markdown(f"{line}."), icon=":material/bedtime:")


MARKED = (
    "Marked: tokens that are not in the longest runs shared with the unsteered text. The changes of the random control "
    "are multiplied so that its KL on the unsteered text is that of ×1, within 5 %. The KL beside each text is on the "
    "text itself."
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

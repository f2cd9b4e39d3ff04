"""Pieces of the Steering page. Everything that touches the model holds its lock."""

from __future__ import annotations

from typing import Any

import loaders
import page
import session
import streamlit as st

from saelab import viz
from saelab.runs import Run
from saelab.steering import OPERATIONS, difference_of_means, dose_response
from saelab.workspace import recipes, steering
from saelab.workspace.steering import Pick

NEUTRAL = (
    "The committee will meet again in the spring to discuss the budget.\n"
    "Water boils at a lower temperature in the mountains.\n"
    "She opened the letter and read it twice before answering.\n"
    "The museum holds a large collection of early maps."
)

CONTINUATIONS = {
    "unsteered": "the model as it is, with the same seed",
    "steered": "with every intervention on the left",
    "random control": "the same changes along random directions: vectors of equal length added, or projected out",
}


def picks(run: Run, source: Any) -> list[Pick]:
    """This session's picks for this run, including a latent or a recipe that another page sent."""
    found: list[Pick] = st.session_state.setdefault("steering_picks", {}).setdefault(run.name, [])
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


def _put(found: list[Pick], pick: Pick) -> None:
    if pick.label not in {p.label for p in found}:
        found.append(pick)


def add_latent(run: Run, source: Any) -> None:
    """A latent by number."""
    with st.form("steering_latent", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        latent = st.number_input("latent", 0, source.sae.d_sae - 1, 0, key="steering_latent_number", width=150)
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
        name = st.text_input("name", "means", key="steering_means_name", **session.KEEP)
        positive = st.text_area(
            "texts with the concept, one a line", key="steering_positive", height=90, **session.KEEP
        )
        negative = st.text_area("texts without it, one a line", key="steering_negative", height=90, **session.KEEP)
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
    return loaders.promoted(run, model, pick.vector.direction, count)


def edit(run: Run, model: Any, found: list[Pick]) -> list[Pick]:
    """Operation, amount and unit of each pick; returns the picks as edited."""
    for i, pick in enumerate(list(found)):
        with st.container(border=True):
            with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
                st.markdown(f"**{viz.markdown(pick.label)}**")
                if st.button("Remove", key=f"steering_remove_{pick.label}", icon=":material/close:", type="tertiary"):
                    found.pop(i)
                    st.rerun()
            _effect(run, model, pick)
            if pick.where != "all":
                page.html(viz.caption(f"acts on: {pick.where}"))
            if pick.skip_first is not None:
                page.html(viz.caption(f"first token: {'left unchanged' if pick.skip_first else 'steered as well'}"))
            if pick.keep_error is False:
                page.html(viz.caption("the SAE's reconstruction error is dropped"))
            with st.container(horizontal=True, vertical_alignment="bottom"):
                pick = _operation_and_amount(pick)
            if size := steering.size(pick):
                page.html(viz.caption(size))
            found[i] = pick
    return found


def _operation_and_amount(pick: Pick) -> Pick:
    known = steering.operations(pick)
    summaries = "\n".join(f"- {name}: {OPERATIONS[name].summary()}" for name in known)
    operation = st.selectbox(
        "do", known, known.index(pick.operation), key=f"steering_do_{pick.label}", width=140, help=summaries
    )
    amount = OPERATIONS[operation].amount
    if amount is None:
        return pick.changed(operation=operation)
    # The slider leaves room beyond the amount of a loaded recipe.
    largest = amount.largest if pick.start is None else max(amount.largest, 2 * abs(pick.start))
    least, number = -largest if amount.signed else 0.0, amount.default
    if operation == pick.operation:
        # The settings are kept while another page is visited.
        number = min(max(pick.amount, least), largest)
    number = st.slider(amount.title, least, largest, number, amount.step, key=f"steering_{operation}_{pick.label}")
    unit = pick.unit
    if amount.units:
        units = steering.units(pick)
        key = f"steering_unit_{pick.label}"
        unit = st.selectbox(
            "unit", units, units.index(unit), format_func=steering.UNITS.__getitem__, key=key, width=200
        )
    return pick.changed(operation=operation, amount=number, unit=unit)


def generation(run: Run, source: Any, model: Any, picks: list[Pick]) -> str:
    """The prompt's form and, side by side, its continuations; returns the prompt."""
    with st.form("steering_form", border=False):
        prompt = st.text_area("Prompt", "The weather today", key="steering_prompt", height=70, **session.KEEP)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            length = st.number_input("new tokens", 1, 400, 40, key="steering_length", width=130, **session.KEEP)
            temperature = st.number_input(
                "temperature", 0.0, 2.0, 0.0, 0.1, key="steering_temperature", width=130, **session.KEEP
            )
            seed = st.number_input("seed", 0, 10_000, 0, key="steering_seed", width=110, **session.KEEP)
            asked = st.form_submit_button("Generate", icon=":material/play_arrow:", type="primary", disabled=not picks)
    if not picks:
        st.caption("Pick a latent, or make a vector from two sets of texts.")
    options = {"max_new_tokens": int(length), "temperature": float(temperature), "seed": int(seed)}
    now = steering.described(picks, prompt, options)
    if asked and picks:
        st.session_state["steering_result"] = (run.name, now, generate(model, source, picks, prompt, options))
    name, made_with, result = st.session_state.get("steering_result", (None, "", None))
    if name == run.name:
        show(result, made_with, made_with != now)
    return prompt


def generate(model: Any, source: Any, found: list[Pick], prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    """The prompt continued unsteered, steered, and along random directions of the same size."""
    chosen = {
        "unsteered": [],
        "steered": [steering.intervention(pick, source) for pick in found],
        "random control": [steering.control(pick, seed=i) for i, pick in enumerate(found)],
    }
    made = {}
    bar = st.progress(0.0, "Generating …")
    with loaders.model_lock():
        for i, (name, interventions) in enumerate(chosen.items()):
            bar.progress(i / len(chosen), f"Generating: {name} …")
            made[name] = steering.continue_text(model, prompt, interventions, **options)
    bar.empty()
    return made


def show(result: dict[str, Any], made_with: str, outdated: bool) -> None:
    """The continuations side by side, with the settings that made them; pale where those are no longer the page's.

    Tokens that the unsteered text does not have are marked.
    """
    before = result["unsteered"].tokens
    st.caption(f"Made with {viz.markdown(made_with)}")
    if outdated:
        st.warning("The settings have changed since. Generate again to see what they do.", icon=":material/history:")
    for column, (name, text) in zip(st.columns(len(result)), result.items()):
        with column, st.container(border=True, height="stretch"):
            st.markdown(f"**{name}**", help=CONTINUATIONS[name])
            marks = [0.0] * len(text.tokens) if name == "unsteered" else steering.changed(before, text.tokens)
            strip = viz.token_strip(text.strings, [0.55 * m for m in marks], page.colours(), 1.0, unit="changed")
            page.html(viz.outdated(strip) if outdated else strip)
    st.caption("Marked: tokens that are not in the longest runs shared with the unsteered continuation.")


def doses(run: Run, model: Any, found: list[Pick]) -> None:
    """Effect on a concept and damage elsewhere, over strengths, beside a difference of means and random directions."""
    with st.expander("Measure a vector against its controls"), st.form("steering_dose", border=False):
        label = st.selectbox("vector", [p.label for p in found], format_func=viz.visible, key="dose_pick")
        concept = st.text_input(
            "words whose probability should rise, separated by commas", key="dose_concept", **session.KEEP
        )
        columns = st.columns(2)
        targets = columns[0].text_area(
            "prompts where they could come next", "The weather today is", key="dose_targets", **session.KEEP
        )
        neutral = columns[1].text_area("texts that should not change", NEUTRAL, key="dose_neutral", **session.KEEP)
        positive = columns[0].text_area("texts with the concept (optional)", key="dose_positive", **session.KEEP)
        negative = columns[1].text_area("texts without it (optional)", key="dose_negative", **session.KEEP)
        asked = st.form_submit_button("Measure", icon=":material/science:")
    pick = next(p for p in found if p.label == label)
    if asked:
        unit = steering.best_unit(pick.vector)
        with loaders.model_lock(), st.spinner("Measuring doses …"):
            measured = dose_response(
                model,
                pick.vector,
                lines(targets),
                lines(neutral),
                [word.strip() for word in concept.split(",") if word.strip()],
                strengths=[f"{s}{unit}" for s in (0.25, 0.5, 1.0, 2.0)],
                positive=lines(positive),
                negative=lines(negative),
                n_random=3,
            )
        st.session_state["steering_doses"] = (run.name, pick, measured)
    name, pick, measured = st.session_state.get("steering_doses", (None, None, None))
    if name != run.name:
        return
    gone = "" if any(steering.same_vector(p, pick) for p in found) else " (no longer among the interventions above)"
    st.markdown(f"**{viz.markdown(pick.label)}**{gone}: {viz.markdown(measured.verdict)}.")
    dose_charts([vars(dose) for dose in measured.doses])


def dose_charts(found: list[dict[str, Any]], key: str = "dose") -> None:
    """Effect and damage over strength for every direction."""
    names = list(dict.fromkeys(dose["direction"] for dose in found))
    strengths = sorted({dose["strength"] for dose in found})
    titles = (("logit_shift", "logit shift of the concept"), ("kl", "off-target KL, nats/token"))
    for column, (what, title) in zip(st.columns(2, gap="large"), titles):
        curves = {
            n: [d[what] for d in sorted(found, key=lambda d: d["strength"]) if d["direction"] == n] for n in names
        }
        with column:
            figure = viz.dose_response(strengths, curves, page.colours(), title)
            page.chart(figure, alt=f"{title} over strength", key=f"{key}_{what}")
    st.caption(
        "Logit shift: mean logit of the words minus that of all tokens, after the prompts where they could come next, "
        "steered − unsteered. Off-target KL: of the next-token distribution, unsteered against steered, on the texts "
        "that should not change. Random directions (seeds 0, 1, …) have the vector's length."
    )

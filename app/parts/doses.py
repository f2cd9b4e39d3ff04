"""Dose and response of a vector on the Steering page, beside its controls."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import loaders
import page
import session
import streamlit as st

from parts import steering as steering_parts
from saelab import viz
from saelab.runs import Run
from saelab.steering import DoseResponse, dose_response
from saelab.steering.measure.dose_response import interval_of_another
from saelab.workspace import steering
from saelab.workspace.steering import Pick

CONTROLS = 8  # random directions: with three of them nothing could win, by Student's t with two degrees of freedom
TARGETS = "The weather today is"
NEUTRAL = (
    "The committee will meet again in the spring to discuss the budget.\n"
    "Water boils at a lower temperature in the mountains.\n"
    "She opened the letter and read it twice before answering.\n"
    "The museum holds a large collection of early maps."
)


class Measured(NamedTuple):
    """Doses of a pick, and what they were measured with."""

    run: str
    stamp: tuple[float, ...]
    words: list[str]
    pick: Pick
    found: DoseResponse


def held() -> Measured | None:
    """What this session measured last."""
    return st.session_state.get("steering_doses")


def doses(run: Run, model: Any, found: list[Pick]) -> None:
    """Effect on a concept and damage elsewhere, over strengths, beside a difference of means and random directions."""
    names = {p.label: viz.visible(steering_parts.named(run, p)) for p in found}
    with st.expander("Measure a vector against its controls"), st.form("steering_dose", border=False):
        label = st.selectbox("vector", list(names), format_func=lambda label: names[label], key="dose_pick")
        concept = st.text_input(
            "words whose probability should rise, separated by commas", **session.held_text("dose_concept")
        )
        columns = st.columns(2)
        targets = columns[0].text_area(
            "prompts where they could come next", TARGETS, **session.held_text("dose_targets", TARGETS)
        )
        neutral = columns[1].text_area(
            "texts that should not change", NEUTRAL, **session.held_text("dose_neutral", NEUTRAL)
        )
        positive = columns[0].text_area("texts with the concept (optional)", **session.held_text("dose_positive"))
        negative = columns[1].text_area("texts without it (optional)", **session.held_text("dose_negative"))
        asked = st.form_submit_button("Measure", icon=":material/science:")
        session.say_unshared("dose_concept", "dose_targets", "dose_neutral", "dose_positive", "dose_negative")
    pick = next(p for p in found if p.label == label)
    if asked:
        unit, around = (pick.unit, abs(pick.amount)) if chosen_length(pick) else (steering.best_unit(pick.vector), 1.0)
        words = [word.strip() for word in concept.split(",") if word.strip()]
        with loaders.model_lock(), st.spinner("Measuring doses …"):
            measured = dose_response(
                model,
                pick.vector,
                steering_parts.lines(targets),
                steering_parts.lines(neutral),
                words,
                strengths=[f"{s * around}{unit}" for s in (0.25, 0.5, 1.0, 2.0)],
                positive=steering_parts.lines(positive),
                negative=steering_parts.lines(negative),
                n_random=CONTROLS,
            )
        st.session_state["steering_doses"] = Measured(run.name, run.stamp, words, pick, measured)
    if (last := held()) is not None and last.run == run.name:
        _show(run, found, last)


def _show(run: Run, found: list[Pick], last: Measured) -> None:
    """The verdict with the words it is about, its intervals and its curves."""
    pick, measured, changed = last.pick, last.found, last.stamp != run.stamp
    if changed:
        st.warning(f"{session.CHANGED}. Measure again to see what it does now.", icon=session.OUTDATED)
    gone = "" if any(steering.same_vector(p, pick) for p in found) else " (no longer among the interventions above)"
    name = pick.label if changed else steering_parts.named(run, pick)  # its label may be another's by now
    words = ", ".join(f"‘{viz.markdown(word)}’" for word in last.words)
    st.markdown(f"**{viz.markdown(name)}**{gone}, measured on {words}: {viz.markdown(measured.verdict)}.")
    prompts = measured.curves["vector"].effect.shape[1]
    for one in measured.contrasts:
        known = math.isfinite(one.low)
        interval = f" ({one.low:+.2f} to {one.high:+.2f})" * known
        of = ", 95 % interval" if known else "; one prompt gives no interval"
        page.html(
            viz.caption(f"against {one.control}: {one.difference:+.2f}{interval} in logit shift{of}, at equal damage")
        )
    if prompts == 1:
        st.caption("Measured on one prompt: nothing here says how it is on others. Give several, one a line.")
    now = next((p for p in found if steering.same_vector(p, pick)), pick)
    dose_charts([vars(dose) for dose in measured.doses], chosen=chosen_length(now))


def chosen_length(pick: Pick) -> float | None:
    """The length that a pick adds, in raw units; None where it adds none or turns the vector round."""
    if pick.operation != "add":
        return None
    length = pick.vector.length(f"{pick.amount}{pick.unit}")
    return length if length > 0 else None


def dose_charts(found: list[dict[str, Any]], key: str = "dose", chosen: float | None = None) -> None:
    """Effect and damage over strength for every direction; random directions as the interval of one more of them."""
    names = list(dict.fromkeys(dose["direction"] for dose in found))
    drawn = [name for name in names if name.startswith("random ")]
    strengths = sorted({dose["strength"] for dose in found})
    titles = (("logit_shift", "logit shift of the concept"), ("kl", "off-target KL, nats/token"))
    for column, (what, title) in zip(st.columns(2, gap="large"), titles):
        curves = {
            n: [d[what] for d in sorted(found, key=lambda d: d["strength"]) if d["direction"] == n] for n in names
        }
        band = None
        if len(drawn) > 1:
            low, middle, high = interval_of_another([curves.pop(name) for name in drawn])
            curves["random directions"] = middle
            band = (low, high, f"95 % of random directions ({len(drawn)} drawn)")
        with column:
            figure = viz.dose_response(strengths, curves, page.colours(), title, chosen, band)
            page.chart(figure, alt=f"{title} over strength", key=f"{key}_{what}")
    st.caption(
        "Logit shift: mean logit of the words minus that of all tokens, steered − unsteered, averaged over all tokens "
        "of the prompts where they could come next; of a word of several tokens the first counts, with and without a "
        "space before it. Off-target KL: of the next-token distribution, unsteered against steered, averaged over the "
        "tokens of the texts that should not change. Random directions (seeds 0, 1, …) have the vector's length; the "
        "shaded interval is that of one more such direction (Student's t)."
    )

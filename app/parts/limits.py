"""Where a change of the Steering page is made: on which tokens, how much of it, and at which layers."""

from __future__ import annotations

from typing import Any

import loaders
import page
import session
import streamlit as st

from parts import trial
from saelab.lm.tokens import tokenizer_of
from saelab.runs import Run
from saelab.steering import OPERATIONS, Add, Condition, LatentFires, Schedule, VectorIntervention, calibrate
from saelab.steering.layers import parse_layers
from saelab.steering.measure.calibration import activation_norm
from saelab.steering.measure.passages import calibrate_on, parted
from saelab.steering.neutral import NEUTRAL
from saelab.workspace import steering
from saelab.workspace.picks import condition
from saelab.workspace.steering import Pick

WHEN = "`7>0.5` acts on tokens where latent 7 is above 0.5, `7>0` where it fires, `-7>0` where its negative pole does."
SCHEDULE = (
    "Pairs of a generated token and the share of the change made there: `0:1,20:0` fades out over twenty tokens. The "
    "prompt has the first share."
)
LAYERS = "`4,6,8`, `4-8` or `all`: make the change at these blocks instead of the SAE's own."


def edit(run: Run, source: Any, model: Any, pick: Pick) -> Pick:
    """A pick with the limits that stand in its popover; a limit that cannot be read is said, and the others hold."""
    used = (pick.when is not None) + (pick.schedule is not None) + bool(pick.layers)
    with st.popover(f"Limits ({used})" if used else "Limits", icon=":material/filter_center_focus:"):
        now = shown(pick)
        when, schedule, layers = now
        for key, text in now.items():  # not as the fields' defaults: a link or a recipe may have set them
            st.session_state.setdefault(key, text)
        asked = st.text_input("only where", key=when, help=WHEN, **session.KEEP)
        weights = st.text_input("over generated tokens", key=schedule, help=SCHEDULE, **session.KEEP)
        blocks = ""
        if issubclass(OPERATIONS[pick.operation], VectorIntervention):
            blocks = st.text_input("at blocks", key=layers, help=LAYERS, **session.KEEP)
    for name, read, text in (
        ("when", _condition, asked),
        ("schedule", _schedule, weights),
        ("layers", _layers, blocks),
    ):
        with page.part():
            pick = pick.changed(**{name: read(text.strip(), pick, source)})
    if OPERATIONS[pick.operation] is Add and st.button(
        "Calibrate", key=f"limit_calibrate_{pick.label}", icon=":material/straighten:", help=CALIBRATE, type="tertiary"
    ):
        st.session_state["steering_calibrate"] = pick.label  # in the next pass: the slider has been drawn in this one
        st.rerun()
    return pick


CALIBRATE = (
    f"Find the strength that does a damage of KL {trial.DEFAULT:g} nats per token on five neutral sentences, with the "
    "limits that are set."
)


def shown(pick: Pick) -> dict[str, str]:
    """What the fields of a pick hold, by their keys."""
    schedule = "" if pick.schedule is None else steering.schedule_text(pick.schedule)
    texts = {"when": _condition_text(pick), "schedule": schedule, "layers": pick.layers}
    return {f"limit_{name}_{pick.label}": text for name, text in texts.items()}


def _condition_text(pick: Pick) -> str:
    return steering.condition_text(pick.when) if isinstance(pick.when, LatentFires) else ""


def _condition(text: str, pick: Pick, source: Any) -> Condition | None:
    """The condition of the field; that of a recipe where the field cannot show it, or says the same."""
    if text == _condition_text(pick):
        return pick.when
    return condition(text, source) if text else None


def _schedule(text: str, pick: Pick, source: Any) -> Schedule | None:
    return Schedule.parse(text) if text else None


def _layers(text: str, pick: Pick, source: Any) -> str:
    if text:
        parse_layers(text)
    return text


def calibrated(run: Run, source: Any, model: Any, pick: Pick) -> Pick:
    """The pick at the strength that does moderate damage, made as it will be made, on neutral sentences.

    What acts on generated tokens or by a schedule takes the first third of each for the prompt.
    """

    def made(strength: float) -> Any:
        return steering.interventions(pick.changed(amount=strength / pick.vector.norm, unit="raw"), source, model)

    with loaders.model_lock(), st.spinner("Calibrating the strength …"):
        limit = 4 * (pick.vector.rms_norm or activation_norm(model, pick.vector.hook_name, NEUTRAL))
        if pick.where in ("all", "prompt") and pick.schedule is None:
            found = calibrate(model, made, NEUTRAL, budget_kl=trial.DEFAULT, limit=limit)
        else:
            found = calibrate_on(model, made, parted(tokenizer_of(model), NEUTRAL), trial.DEFAULT, limit)
    return steering.calibrated(pick, found)

"""Why a latent won, shown for each kind of SAE."""

from __future__ import annotations

from typing import Any

import common
import pandas as pd
import streamlit as st
import tables

from saelab import viz
from saelab.features import why as explain
from saelab.sae import LinearSAE
from saelab.sae.matching_pursuit import MatchingPursuit
from saelab.workspace import Run


def active_table(run: Run, reading: Any, position: int) -> tuple[int, int] | None:
    """Active latents of one token, with what the index says of each, where there is one."""
    active = reading.active(position)
    if not active:
        st.info("No latent is active on this token.", icon=":material/bedtime:")
        return None
    rows = pd.DataFrame(active, columns=["latent", "activation"])
    rows["pole"] = [1 if a > 0 else -1 for a in rows["activation"]]
    columns = ["latent", "activation"]
    if run.has_index:
        rows = rows.merge(common.catalogue(run), on=["latent", "pole"], how="left")
        columns += ["label", "top_tokens", "density"] if (rows["label"] != "").any() else ["top_tokens", "density"]
    extra = {"activation": st.column_config.NumberColumn("activation", format="%+.3f", help="raw units")}
    return tables.simple(tables.shown(rows, *columns), rows, key=f"prompt_active_{position}", config=extra)


def names(run: Run, found: list[tuple[int, float]]) -> list[str]:
    """``#12`` and, where the index has one, the start of the label."""
    if not run.has_index:
        return [f"#{latent}" for latent, _ in found]
    index = common.need_index(run)
    rows = [index.latent(latent, 1 if value > 0 or len(index.poles) == 1 else -1) for latent, value in found]
    return [f"#{row['latent']} {(row['label'] or '')[:28]}".strip() for row in rows]


def why(sae: Any, reading: Any, position: int) -> None:
    """The contest for the token, or the replay of the pursuit."""
    st.markdown("**Why these won**")
    x = reading.acts[position]
    if isinstance(sae, MatchingPursuit):
        pursuit(sae, x)
    elif isinstance(sae, LinearSAE):
        contest(sae, x, None if reading.grads is None else reading.grads[position])
    else:
        st.caption(f"No account of the selection is known for a {viz.markdown(sae.variant)} SAE.")


def contest(sae: LinearSAE, x: Any, grad: Any) -> None:
    """Scores of winners and of the best losers, and the line between them."""
    found = explain.contest(sae, x, grad)
    shown = [*found.winners[:12], *found.losers[:8]]
    if len(found.winners) > 12:
        # The weakest winners are where the contest was decided.
        shown = [*found.winners[:6], *found.winners[-6:], *found.losers[:8]]
    labels = [f"#{c.latent}" for c in shown]
    won = [c.activation != 0 for c in shown]
    figure = viz.contest_bars(labels, [c.score for c in shown], won, common.colours(), found.cut)
    common.chart(figure, alt="Scores of winning and losing latents", key="prompt_contest")
    cut = f" at {found.cut:.4g}" if found.cut is not None else ""
    st.caption(f"Filled bars won. They had to pass {found.rule}{cut}.")
    if found.winners:
        closest = min(found.winners, key=lambda c: c.margin)
        st.caption(f"Narrowest win: #{closest.latent}, by {closest.margin:.4g}.")
    if found.losers:
        nearest = max(found.losers, key=lambda c: c.margin)
        st.caption(f"Closest loser: #{nearest.latent}, short by {-nearest.margin:.4g}.")


def pursuit(sae: MatchingPursuit, x: Any) -> None:
    """The replay of matching pursuit with a slider over its steps."""
    steps, start = explain.replay(sae, x, sae.n_steps, float(sae.residual_stop), sae.stop_on_repeat)
    if not steps:
        st.caption("The pursuit ends before its first step: no atom has a positive product with this token.")
        return
    at = st.slider("step", 1, len(steps), 1, key="prompt_step") if len(steps) > 1 else 1
    norms = [start, *(s.residual_norm for s in steps)]
    figure = viz.steps(norms, at, common.colours(), "step", "norm of the residual")
    common.chart(figure, alt="Norm of the residual after each step of the pursuit", key="prompt_pursuit")
    step = steps[at - 1]
    st.markdown(
        f"Step {at} takes **#{step.latent}** with coefficient {step.coefficient:.4g} "
        f"and leaves a residual of norm {step.residual_norm:.4g}. "
        f"Runner-up: #{step.runner_up} with product {step.runner_up_product:.4g}."
    )


def effects(sae: Any, reading: Any, position: int) -> None:
    """Activation x gradient: what each latent does to the loss."""
    st.subheader("Activation × gradient", anchor=False)
    found = explain.effects(sae, reading.acts[position], reading.grads[position])
    if not found:
        st.caption("No latent is active on this token.")
        return
    left, right = st.columns([3, 2], gap="large")
    labels = [f"#{e.latent}: effect {e.effect:+.4g}" for e in found]
    figure = viz.scatter(
        [e.activation for e in found],
        [e.effect for e in found],
        labels,
        common.colours(),
        "activation",
        "effect on the loss, nats",
    )
    with left:
        common.chart(figure, alt="Effect on the loss against activation, one point per latent", key="prompt_effects")
    inert, causal = explain.inert_and_causal(found)
    with right:
        for title, some, help_text in (
            ("Active but inert", inert, "upper half by activation, lowest quarter by effect"),
            ("Quiet but causal", causal, "lower half by activation, highest quarter by effect"),
        ):
            st.markdown(f"**{title}**", help=help_text)
            rows = [(f"#{e.latent}", f"{e.effect:+.4g}", f"activation {e.activation:.3g}") for e in some]
            common.html(viz.fact_table(rows) if rows else viz.caption("none on this token"))

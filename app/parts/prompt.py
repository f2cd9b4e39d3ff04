"""Why a latent was selected, for each kind of SAE."""

from __future__ import annotations

from typing import Any

import loaders
import page
import pandas as pd
import streamlit as st

from parts import tables
from saelab import viz
from saelab.prompt import contest as explain
from saelab.runs import Run
from saelab.sae.base import PursuitStep


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
        rows = rows.merge(loaders.catalogue(run), on=["latent", "pole"], how="left")
        columns += ["label", "top_tokens", "density"] if any(rows["label"]) else ["top_tokens", "density"]
    extra = {
        "activation": st.column_config.NumberColumn("activation", format="%+.2f", width=80, help="raw units"),
        "label": st.column_config.TextColumn("label", width=110),
        "top_tokens": st.column_config.TextColumn("fires on", width=110, help="tokens it fires on most often"),
    }
    view = tables.shown(rows, *columns)
    return tables.simple(view, rows, key=f"prompt_active_{position}", config=extra, height=480)


def names(run: Run, found: list[tuple[int, float]]) -> list[str]:
    """``#12`` and, where the index has one, the start of the label."""
    return [f"#{latent} {label}".strip() for (latent, _), label in zip(found, labels(run, found))]


def labels(run: Run, found: list[tuple[int, float]]) -> list[str]:
    """The start of each (latent, activation)'s label; empty without an index."""
    if not run.has_index:
        return [""] * len(found)
    index = loaders.need_index(run)
    rows = [index.latent(latent, 1 if value > 0 or len(index.poles) == 1 else -1) for latent, value in found]
    return [_short(row["label"] or "") for row in rows]


def _short(label: str, most: int = 28) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def why(run: Run, reading: Any, position: int) -> None:
    """The steps that made the code, or the contest of all latents for the token."""
    st.markdown("**Why these won**")
    sae, x = loaders.sae(run), reading.acts[position]
    grad = None if reading.grads is None else reading.grads[position]
    if (made := sae.replay(x)) is not None:
        pursuit(run, *made)
    elif (found := explain.contest(sae, x, grad)) is not None:
        contest(run, found)
    else:
        st.caption(f"A {viz.markdown(sae.variant)} SAE cannot explain its selection.")


def contest(run: Run, found: explain.Contest) -> None:
    """Scores of winners and of the closest losers, and the cut."""
    first, last = found.winners, []
    if len(found.winners) > 12:
        # The weakest winners are shown, because they decide the contest.
        first, last = found.winners[:6], found.winners[-6:]
    shown = [*first, *last, *found.losers[:8]]
    left_out = len(found.winners) - len(first) - len(last)
    names = [f"#{c.latent}" for c in shown]
    notes = labels(run, [(c.latent, c.pre_act) for c in shown])
    cut = [c.score - c.margin for c in shown] if found.cut is None else found.cut
    figure = viz.contest_bars(
        names,
        [c.score for c in shown],
        [c.activation != 0 for c in shown],
        page.colours(),
        cut,
        found.score,
        notes,
        (len(first), f"{left_out} more") if left_out else None,
    )
    page.chart(figure, alt="Scores of winning and losing latents", key="prompt_contest")
    line = f"the dotted line is {found.rule}, {found.cut:.4g}" if found.cut is not None else f"a mark is {found.rule}"
    said = [f"Filled bars won; {line}, all in raw units."]
    if found.winners:
        said.append(f"Narrowest win: #{found.winners[-1].latent}, by {found.winners[-1].margin:.4g}.")
    if found.losers:
        said.append(f"Closest loser: #{found.losers[0].latent}, short by {-found.losers[0].margin:.4g}.")
    st.caption(" ".join(said))


def pursuit(run: Run, steps: list[PursuitStep], start: float) -> None:
    """The replay of matching pursuit with a slider over its steps."""
    if not steps:
        st.caption("The pursuit ends before its first step: no atom has a positive product with this token.")
        return
    at = st.slider("step", 1, len(steps), 1, key="prompt_step") if len(steps) > 1 else 1
    norms = [start, *(s.residual_norm for s in steps)]
    figure = viz.steps(norms, at, page.colours(), "step", "norm of the residual")
    page.chart(figure, alt="Norm of the residual after each step of the pursuit", key="prompt_pursuit")
    step = steps[at - 1]
    winner, runner_up = names(run, [(step.latent, 1.0), (step.runner_up, 1.0)])
    st.markdown(
        f"Step {at} takes **{viz.markdown(winner)}** with coefficient {step.coefficient:.4g} "
        f"and leaves a residual of norm {step.residual_norm:.4g}, {step.residual_norm / start:.1%} of the first. "
        f"Runner-up: {viz.markdown(runner_up)} with product {step.runner_up_product:.4g}."
    )
    st.caption("Each step takes the largest product ⟨residual, decoder row⟩ and subtracts that part; raw units.")


def effects(run: Run, reading: Any, position: int) -> None:
    """Activation x gradient: the effect of each latent on the loss."""
    st.subheader("Activation × gradient", anchor=False)
    st.caption(
        "Effect: activation × (decoder row · gradient of the summed next-token loss), the loss that the latent adds, "
        "to first order; a negative one lowers it. The gradient knows the next token."
    )
    sae = loaders.sae(run)
    found = explain.effects(sae, reading.acts[position], reading.grads[position])
    if not found:
        st.caption("No latent is active on this token.")
        return
    left, right = st.columns([3, 2], gap="large")
    hovers = [f"#{e.latent}: effect {e.effect:+.4g}" for e in found]
    figure = viz.scatter(
        [e.activation for e in found],
        [e.effect for e in found],
        hovers,
        page.colours(),
        "activation, raw units",
        "effect on the loss, nats",
    )
    with left:
        page.chart(figure, alt="Effect on the loss against activation, one point per latent", key="prompt_effects")
    inert, causal = explain.inert_and_causal(found)
    with right:
        for title, some, help_text in (
            ("Active but inert", inert, "upper half by activation, lowest quarter by effect"),
            ("Quiet but causal", causal, "lower half by activation, highest quarter by effect"),
        ):
            st.markdown(f"**{title}**", help=help_text)
            named = labels(run, [(e.latent, e.activation) for e in some])
            rows = [
                (f"#{e.latent}", f"{e.effect:+.4f} nats", f"activation {e.activation:.3g} · {label}".rstrip(" ·"))
                for e, label in zip(some, named)
            ]
            page.html(viz.fact_table(rows) if rows else viz.caption("none on this token"))

"""Why a latent was selected, for each kind of SAE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import loaders
import numpy as np
import page
import pandas as pd
import session
import streamlit as st

from parts import strip, tables
from saelab import viz
from saelab.prompt import contest as explain
from saelab.prompt.ranking import RANKINGS, Ranked, rank
from saelab.prompt.reading import Reading
from saelab.runs import Run
from saelab.runs.language_model import untrained_start
from saelab.sae.base import PursuitStep
from saelab.viz.axes import shortened
from saelab.workspace.relatives import apart, other_model

SHOWN = 14  # latents of the ranking
WINDOW = 60  # tokens that a chart can name
TOKEN = "token"  # the chosen one: a field, and part of the address
TITLES = {
    "telling": "how much they tell",
    "share": "share of their maximum",
    "activation": "activation",
    "effect": "effect on the loss",
}


class How(NamedTuple):
    """How latents are ranked, and whether those that fire on nearly everything are left out."""

    by: str
    hide_dense: bool


def choose_ranking(run: Run, reading: Reading) -> tuple[How, int]:
    """The ranking of all tables of the page, of those that the index and the reading allow; and the chosen token."""
    known = [
        name
        for name in RANKINGS
        if (run.has_index or name in ("activation", "effect")) and (name != "effect" or reading.grads is not None)
    ]
    if st.session_state.get("prompt_rank") not in known:  # one that another reading or SAE allowed
        st.session_state.pop("prompt_rank", None)
    usual, last = reading.first + 1 if reading.n > 1 else 0, reading.n - 1
    if st.session_state.get(TOKEN) is not None and not 0 <= st.session_state[TOKEN] <= last:
        st.session_state[TOKEN] = last  # of a longer text
    with st.container(horizontal=True, vertical_alignment="bottom"):
        by = st.selectbox(
            "rank latents by",
            known,
            format_func=TITLES.__getitem__,
            help="\n".join(f"- {TITLES[name]}: {what}" for name, what in RANKINGS.items()),
            width=240,
            **session.held("prompt_rank", known[0], TITLES.__getitem__),
        )
        help = "the token to look at; a click in the text below chooses it too"
        position = int(st.number_input("token", 0, last, min(usual, last), help=help, **session.held(TOKEN, usual)))
        hide = False
        if run.has_index:
            rare = "those on more than 10 % of the corpus"
            hide = st.toggle("hide dense latents", True, help=rare, **session.held("prompt_hide_dense", True))
    return How(by, hide), position


def ranked(run: Run, reading: Reading, how: How, position: int | None = None) -> tuple[list[Ranked], int]:
    """The latents of a text, or of one token, in the chosen order, and the number of dense ones left out."""
    known, by = loaders.known(run) if run.has_index else None, ranking(run, how)
    rows = loaders.sae(run).W_dec.detach() if by == "effect" else None
    return rank(reading, by, known, rows, position=position, hide_dense=how.hide_dense)


def ranking(run: Run, how: How) -> str:
    """The ranking of an SAE: the chosen one, or by activation where that needs an index and there is none."""
    return how.by if run.has_index or how.by == "effect" else "activation"


def coloured_text(run: Run, reading: Reading, position: int, how: How) -> None:
    """The tokens, tinted by what is lost, by the number of active latents or by one of them; one token is chosen."""
    lost, counts = reading.unexplained(), [float(count) for count in reading.l0()]
    with st.container(horizontal=True, vertical_alignment="center"):
        layer = st.segmented_control(
            "Colour by",
            ["unexplained", "active latents", "one latent"],
            default="unexplained",
            required=True,
            **session.held("prompt_layer", "unexplained"),
        )
        found, _ = ranked(run, reading, how)
        one = None
        if layer == "one latent" and found:
            texts = dict(zip([row[:2] for row in found], names(run, [(r.latent, r.activation) for r in found])))
            kept = st.session_state.get("prompt_one")
            one = st.selectbox(
                "latent",
                list(texts),
                list(texts).index(kept) if kept in texts else 0,
                format_func=lambda pair: viz.visible(texts[pair]),
                key=f"prompt_latent_{run.name}_{how.by}_{how.hide_dense}",
                width=420,
            )
            st.session_state["prompt_one"] = one
    values, unit, scale = lost, "share of squared norm lost", max(lost[reading.first :] or lost)
    said = (
        f"{lost_formula(run, reading)} per token, without the mean taken off as for the FVU: 0 is a perfect "
        f"reconstruction, 1 is as good as nothing. Here from {min(lost[reading.first :] or lost):.1%} to {scale:.1%}, "
        "the full tint."
    )
    if layer == "active latents":
        counted = counts[reading.first :] or counts
        least, most = min(counted), max(counted)
        # Where every token has the same number there is nothing to see in it.
        values, unit, scale = [c - least if c > least else 0.0 for c in counts], "active latents above the fewest", 0.0
        said = f"From {least:.0f} to {most:.0f} active latents, the full tint."
        if least == most:
            said = f"{least:.0f} active latents on every token."
    elif layer == "one latent":
        said = "No latent that is shown is active on this text." if one is None else "Its activation, raw units."
        values, unit = [0.0] * reading.n if one is None else reading.trace(one[0]), "activation"
        scale = max((abs(value) for value in values[reading.first :]), default=0.0)
    strip.tokens(reading.strings, values, position, choose, unit=unit, scale=scale or None, key="prompt_strip")
    st.caption(f"{said} Click a token, or walk with the arrow keys, to see it below.")


def lost_formula(run: Run, reading: Reading) -> str:
    """The share of the squared norm that is lost, in symbols: of what a transcoder writes, not of what it reads."""
    if reading.target is None:
        return "‖x − x̂‖² / ‖x‖²"
    place = run.metadata.get("hook_name_out")
    return f"‖y − ŷ‖² / ‖y‖², y being the output that the transcoder reconstructs ({place}),"


def choose(position: int) -> None:
    """Look at another token."""
    st.session_state[TOKEN] = position


def quoted(string: str) -> str:
    """A token as a heading shows it."""
    return f"‘{viz.markdown(string.strip() or '␣')}’"


def strongest(run: Run, reading: Reading, position: int, how: How) -> None:
    """The first latents of the ranking on each token, in a window around the chosen one where the text is long."""
    found, hidden = ranked(run, reading, how)
    if found:
        start = max(0, min(position - WINDOW // 2, reading.n - WINDOW))
        stop = min(reading.n, start + WINDOW)
        best = [(row.latent, row.activation) for row in found[:SHOWN]]
        rows = np.array([reading.trace(latent)[start:stop] for latent, _ in best])
        # On the first token an attention sink is many times as strong as anything behind it.
        untrained = max(0, reading.first - start)
        figure = viz.heatmap(rows, full_names(run, best), reading.strings[start:stop], page.colours(), first=untrained)
        page.chart(figure, alt="Activation of the first latents of the ranking on each token", key="prompt_heatmap")
        where = "" if stop - start == reading.n else f" Tokens {start} to {stop - 1}, around the chosen one."
        st.caption(f"The first {len(best)} of {len(found):,} active latents.{where}{left_out(hidden)}")
    else:
        st.caption(f"No latent is active on this text.{left_out(hidden)}")


def left_out(hidden: int) -> str:
    return f" {hidden} dense ones are hidden." if hidden else ""


def not_beside(run: Run, other: Run) -> str:
    """Why an SAE cannot read the activations that another one reads."""
    return apart(run, other) or "one of the two was trained with a token at the start of each text, the other without"


def side_by_side(runs: list[Run], reading: Reading, how: How) -> None:
    """The same activations through several SAEs: what each loses, and the first latents of each.

    All count the same positions: those that all of them were trained on.
    """
    reading = replace(reading, first=min(max(map(untrained_start, runs)), reading.n - 1))
    for column, run in zip(st.columns(len(runs), gap="medium"), runs):
        with column, page.part():
            own = reading.through(loaders.sae(run))
            lost = np.mean(own.unexplained()[own.first :])
            st.markdown(f"**{viz.markdown(page.run_title(run))}**")
            st.caption(
                f"{np.mean(own.l0()[own.first :]):.1f} active latents and {lost:.1%} of the squared norm lost, means "
                "over the tokens"
            )
            if other_model(runs[0], run):
                st.caption(f"Trained on another model, {viz.markdown(str(run.model_name))}.")
            found, hidden = ranked(run, own, how)
            chosen = ranked_table(run, own, found[:SHOWN], key=f"prompt_beside_{run.name}")
            by = "" if ranking(run, how) == how.by else " Ranked by activation, because it has no feature index."
            st.caption(f"{len(found):,} active latents.{left_out(hidden)}{by}")
        if chosen is not None:
            session.open_latent(*chosen, run)


def ranked_table(run: Run, reading: Reading, found: list[Ranked], key: str) -> tuple[int, int] | None:
    """Ranked latents with what the index says of each; the one whose row is clicked."""
    rows = pd.DataFrame(found, columns=list(Ranked._fields))
    rows["token"] = [reading.strings[at] for at in rows["position"]]
    columns = ["latent", *(["pole"] if loaders.sae(run).signed else []), "token", "activation"]
    if run.has_index:
        rows = rows.merge(loaders.catalogue(run), on=["latent", "pole"], how="left")
        columns += ["label", "top_tokens", "density"] if any(rows["label"]) else ["top_tokens", "density"]
    extra = {
        "token": st.column_config.TextColumn("on token", width=90, help="where it scores highest"),
        "activation": st.column_config.NumberColumn("activation", format="%+.2f", width=80, help="raw units"),
        "label": st.column_config.TextColumn("label", width=170),
        "top_tokens": st.column_config.TextColumn("fires on", width=110, help="tokens it fires on most often"),
    }
    view = tables.shown(rows, *columns)
    view["token"] = view["token"].map(viz.visible)
    return tables.simple(view, rows, key=key, config=extra, height=min(480, 40 + 35 * max(1, len(rows))))


def active_table(run: Run, reading: Reading, position: int, how: How) -> tuple[int, int] | None:
    """Active latents of one token in the chosen order, with what the index says of each, where there is one."""
    found, hidden = ranked(run, reading, how, position)
    if not found:
        st.info(f"No latent is active on this token.{left_out(hidden)}", icon=":material/bedtime:")
        return None
    picked = ranked_table(run, reading, found, key=f"prompt_active_{position}")
    if hidden:
        st.caption(left_out(hidden).strip())
    return picked


def names(run: Run, found: list[tuple[int, float]]) -> list[str]:
    """``#12`` and, where the index has one, the start of the label."""
    return [f"#{latent} {label}".strip() for (latent, _), label in zip(found, labels(run, found))]


def full_names(run: Run, found: list[tuple[int, float]]) -> list[str]:
    """``#12`` and the whole label."""
    return [f"#{latent} {label}".strip() for (latent, _), label in zip(found, full_labels(run, found))]


def labels(run: Run, found: list[tuple[int, float]]) -> list[str]:
    """The start of each (latent, activation)'s label; empty without an index."""
    return [shortened(label, 28) for label in full_labels(run, found)]


def full_labels(run: Run, found: list[tuple[int, float]]) -> list[str]:
    """The label of each (latent, activation); empty without an index."""
    if not run.has_index:
        return [""] * len(found)
    index = loaders.need_index(run)
    rows = [index.latent(latent, 1 if value > 0 or len(index.poles) == 1 else -1) for latent, value in found]
    return [row["label"] or "" for row in rows]


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
    if position == reading.n - 1:  # its gradient is zero: a chart of zeros would pass for a finding
        st.caption("This is the last token: the text has no next one that its latents could make likelier.")
        return
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

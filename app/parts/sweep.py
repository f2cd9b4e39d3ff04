"""The table of a sweep on the Training page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import page
import pandas as pd
import session
import streamlit as st

from parts import source as source_parts
from parts import tables
from saelab import viz
from saelab.layout import SWEEP_TABLE
from saelab.sweep import guidance, load_results, load_summary, points_of
from saelab.viz.sweep import (
    AXES,
    COLUMNS,
    COSTS,
    DIFFERENCE_COLUMNS,
    DIFFERENCES,
    RATES,
    SUMMARY,
    SUMMARY_COLUMNS,
    WHICH_L0,
    chance,
    lost_rates,
    pareto_of,
    rates_of,
)
from saelab.workspace import FORMULAS, Workspace

ONE_SEED = "One seed of each: what another seed would give is not known, so no difference is tested"
SHORT = {"fvu": "FVU", "dead_fraction": "dead", "ce_loss_recovered_zero": "CE recovered"}


@st.cache_data(max_entries=8, show_spinner=False)
def _rows(folder: str, stamp: float) -> list[dict[str, Any]]:
    return load_results(folder)


@st.cache_data(max_entries=8, show_spinner=False)
def _summary(folder: str, stamp: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return load_summary(folder)


def show(found: Workspace, logged: list[str]) -> None:
    """One sweep: its members on held-out tokens, and the way to their curves."""
    session.say_unknown("training_sweep", found.sweeps)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(
            "sweep",
            list(found.sweeps),
            format_func=viz.visible,
            width=320,
            **session.held("training_sweep", next(iter(found.sweeps)), viz.visible),
        )
        folder: Path = found.sweeps[name]
        rows = _rows(str(folder), (folder / SWEEP_TABLE).stat().st_mtime)
        measured = [value for value in AXES if any(row[value] is not None for row in rows)]
        value = None
        if measured:
            value = st.segmented_control(
                "fidelity",
                measured,
                default=measured[0],
                required=True,
                format_func=SHORT.__getitem__,
                **session.held("training_fidelity", measured[0], SHORT.__getitem__),
            )
        members = [run for run in logged if Path(run).parent == Path(name)]
        if members and st.button("Show all their curves", key="training_members", icon=":material/show_chart:"):
            st.session_state["training_runs"] = members
    left, right = st.columns([3, 4], gap="large")
    with left:
        _figures(rows, value)
    with right:
        event = _table(rows, measured)
        picked = tables.picked_row(event, rows)
        if picked is None:
            st.caption("Click a row to see where its numbers come from.")
        else:
            member = found.runs.get((Path(name) / (picked["folder"] or picked["name"])).as_posix())
            if member is not None:
                source_parts.of_run(member)
    if advice := guidance(points_of(rows)):
        st.caption(WHICH_L0)
        for one in advice:
            st.caption(viz.markdown(one.sentence))
    _means(*_summary(str(folder), (folder / SWEEP_TABLE).stat().st_mtime))


def _figures(rows: list[dict[str, Any]], value: str | None) -> None:
    """The trade-off of the members, and the learning rates that were tried."""
    if value is not None:
        figure = pareto_of(rows, value, page.colours())
        page.chart(figure, alt=f"{AXES[value]} against L0 for every SAE of the sweep", key="training_pareto")
    else:
        st.caption("No SAE of this sweep was measured.")
    rates = rates_of(rows, page.colours(), height=240)
    if rates is not None:
        st.caption(RATES)
        for line in lost_rates(rows):
            st.caption(viz.markdown(line))
        page.chart(rates, alt="FVU on validation tokens against the learning rates tried", key="training_rates")


def _means(summaries: list[dict[str, Any]], differences: list[dict[str, Any]]) -> None:
    """Means over seeds and differences between variants, where the sweep has several SAEs to compare."""
    if not summaries:
        return
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    config = {
        "name": text("SAE", pinned=True, width=240),
        "seeds": number("seeds", width=60),
        "documents": number("documents", width=90, help="held-out documents over which intervals are taken"),
        "l0": number("L0", format="%.1f", width=70),
        "fvu": number("FVU", format="%.4f", width=80),
        "interval": text("95 % interval", width=130),
        "dead_fraction": number("dead", format="percent", width=70),
        "ce_loss_recovered_zero": number("CE recovered", format="percent", width=110),
        "shared_latents": number("shared by seeds", format="percent", help="latents that the other seeds have, too"),
        "shared_by_chance": number("by chance", format="percent", help="the same for random directions"),
        "cpu_seconds": number("processor s", format="%.1f", help=COSTS["cpu_seconds"]),
        "parameters": number("parameters", format="compact"),
        "a": text("a", width=220),
        "b": text("b", width=220),
        "difference": number("a − b", format="%+.4f", width=90),
        "verdict": text("verdict", width=120),
    }
    options: Any = {"hide_index": True, "column_config": config, "placeholder": "–"}
    st.caption(SUMMARY if max(row["seeds"] for row in summaries) > 1 else ONE_SEED)
    view = _with_interval(pd.DataFrame(summaries, columns=SUMMARY_COLUMNS), "fvu", "fvu_low", "fvu_high")
    view = view.dropna(axis="columns", how="all")
    st.dataframe(view.assign(name=view["name"].map(viz.visible)), key="training_means", alt=SUMMARY, **options)
    if differences:
        st.caption(f"{DIFFERENCES}. {chance(differences)}")
        view = _with_interval(pd.DataFrame(differences, columns=DIFFERENCE_COLUMNS), "difference", "low", "high")
        view = view.assign(**{name: view[name].map(viz.visible) for name in ("a", "b")})
        st.dataframe(view, key="training_differences", alt=DIFFERENCES, **options)


def _with_interval(view: pd.DataFrame, value: str, low: str, high: str) -> pd.DataFrame:
    """The ends of an interval as one column after its value; empty where there is none."""
    ends = [None if pd.isna(a) or pd.isna(b) else f"{a:.4f} to {b:.4f}" for a, b in zip(view[low], view[high])]
    shown = view.drop(columns=[low, high])
    shown.insert(list(shown.columns).index(value) + 1, "interval", ends)
    return shown


def _table(rows: list[dict[str, Any]], measured: list[str]) -> Any:
    """The SAEs of a sweep as a table; returns the selection."""
    view = pd.DataFrame(rows, columns=COLUMNS)
    for text in ("name", "message"):
        view[text] = view[text].fillna("").map(viz.visible)
    number = st.column_config.NumberColumn
    config = {
        "l0": number("L0", format="%.1f", help=f"{FORMULAS['l0']}, on held-out tokens"),
        "fvu": number("FVU", format="%.4f", help=f"{FORMULAS['fvu']} on held-out tokens"),
        "dead_fraction": number("dead", format="percent", help=FORMULAS["dead"]),
        "ce_loss_recovered_zero": number(
            "CE recovered", format="percent", help=f"{FORMULAS['ce_recovered']}, against zero ablation"
        ),
        "lr": number(format="%.1e", help="Learning rate; where it was tuned, the best one on validation tokens"),
    }
    view = view.drop(columns=[c for c in view.columns if c in AXES and c not in measured])
    if not any(view["message"]):
        view = view.drop(columns="message")
    return st.dataframe(
        view,
        hide_index=True,
        column_config=config,
        on_select="rerun",
        selection_mode=tables.CLICK,
        key="training_sweep_table",
        placeholder="–",
        alt="The SAEs of the sweep with their numbers on held-out tokens",
    )

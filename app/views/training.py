"""Curves of runs in training or finished; they are redrawn while a log grows."""

from typing import Any

import loaders
import page
import session
import streamlit as st
from parts import source as source_parts
from parts import sweep as sweep_parts

from saelab import viz, workspace

CURVES = {
    "fvu": "FVU",
    "loss": "loss",
    "l0": "L0",
    "dead": "dead latents",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}

COLUMNS = 4

found = loaders.workspace()
st.title("Training", anchor=False)
logged, unread = loaders.logged(found)
for message in unread:
    st.error(viz.markdown(message), icon=":material/error:")
if found.sweeps:
    with st.expander(f"Sweeps ({len(found.sweeps)})", icon=":material/grid_view:", expanded=True), page.part():
        sweep_parts.show(found, list(logged))
if not logged:
    st.info("No run below this folder has a log (`metrics.jsonl`) yet.", icon=":material/info:")
    st.stop()

current = st.session_state.get("run")
default = [current] if current in logged else list(logged)[:1]
session.say_left_out("training_runs", logged, lambda other: "it has no log (metrics.jsonl) that can be read")
if "training_runs" in st.session_state:  # of runs that are no longer there
    st.session_state["training_runs"] = [name for name in st.session_state["training_runs"] if name in logged]
with st.container(horizontal=True, vertical_alignment="bottom"):
    names = st.multiselect(
        "runs", list(logged), default, format_func=viz.visible, **session.held("training_runs", default, viz.visible)
    )
    axis = st.segmented_control(
        "x axis", ["tokens", "step"], default="tokens", required=True, **session.held("training_axis", "tokens")
    )
    live = st.toggle(
        "follow",
        value=any(at.state == "running" for at in logged.values()),
        key="training_live",
        help="Read the logs again every two seconds",
    )


@st.fragment(run_every=2 if live else None)
def followed() -> None:
    """The state and the curves of the chosen runs, read anew on every call."""
    logs = {}
    for name in names:
        with page.part():
            logs[name] = loaders.metrics(found.runs[name])
    states({name: rows[-1] for name, rows in logs.items()})
    if len(logs) > 1:
        page.html(viz.line_legend(viz.looks(list(logs), page.colours())))
    curves({name: workspace.thin(rows) for name, rows in logs.items()})


def states(last: dict[str, dict[str, Any]]) -> None:
    """Of each chosen run the last number of its log, and whether it is still being trained."""
    for start in range(0, len(last), COLUMNS):
        for column, (name, row) in zip(st.columns(COLUMNS), list(last.items())[start : start + COLUMNS]):
            at = workspace.progress(found.runs[name])
            column.metric(
                viz.markdown(name),
                f"FVU {row['fvu']:.4f}" if "fvu" in row else f"step {row['step']:,}",
                at.text() if at else "",
                delta_color="off",
                delta_arrow="off",
                help=f"{workspace.FORMULAS['fvu']} of the last training batch; held-out numbers stand on the Overview. "
                "A run is interrupted if it has not reached its last step and its log has not grown for two minutes.",
            )


def curves(logs: dict[str, list[dict[str, Any]]]) -> None:
    """All curves of the chosen runs."""
    found_in = set().union(*(workspace.measured(rows[-1]) for rows in logs.values()))
    columns = st.columns(2, gap="large")
    for i, key in enumerate([*CURVES, *sorted(found_in - {*CURVES, "step", "tokens"})]):
        series = {name: workspace.series(rows, axis, key) for name, rows in logs.items()}
        title = CURVES.get(key, key)
        log_y = key in {"fvu", "loss", "grad_norm"}
        with columns[i % 2]:
            figure = viz.lines(series, page.colours(), axis, title, log_y=log_y, legend=False)
            page.chart(figure, alt=f"{title} over {axis}", key=f"training_{key}")


if names:
    st.caption(
        "A point is one training batch. FVU: its squared error over the variance of the whole cache; loss: FVU and the "
        "variant's weighted extra terms; gradient norm: before clipping; dead latents: silent for `dead_after` tokens."
    )
    followed()
    with st.expander("Commands"):
        source_parts.commands(*(workspace.train_command(found.runs[name]) for name in names))

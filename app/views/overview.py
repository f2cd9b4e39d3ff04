"""All SAEs below the folder: their numbers, the source of each, and the trade-off of sparsity and fidelity."""

import loaders
import page
import pandas as pd
import session
import streamlit as st
from parts import evidence, tables
from parts import source as source_parts

from saelab import viz, workspace
from saelab.features.search import per_latent

found = loaders.workspace()
st.title("Overview", anchor=False)
counts = [f"{n} {name}{'' if n == 1 else 's'}" for name, n in (("run", len(found.runs)), ("cache", len(found.caches)))]
st.caption(f"{' and '.join(counts)} below {viz.markdown(found.root.name)}")
if not found.runs:
    st.info(
        "This folder holds no run yet. Two commands fill it:\n\n"
        "    saelab harvest --model smollm2 --hook blocks.9.hook_resid_post --text wiki-sample --out DIR/cache\n"
        "    saelab train DIR/cache --variant topk --k 32 --d-sae 4608 --out DIR/run",
        icon=":material/info:",
    )
    st.stop()

layers = {name: workspace.layer(run) for name, run in found.runs.items()}
several = len({number for number in layers.values() if number is not None}) > 1
# Runs of several layers stand together by layer.
names = sorted(found.runs, key=lambda name: several and (layers[name] is None, layers[name] or 0))
rows = pd.DataFrame([loaders.summary(found.runs[name]) for name in names])
if not several:
    rows = rows.drop(columns="layer", errors="ignore")
if "place" in rows.columns and len(rows["place"].dropna().unique()) < 2:
    rows = rows.drop(columns="place")
for message in rows.loc[rows["damaged"], "state"]:
    st.error(viz.markdown(message), icon=":material/error:")
rows.loc[rows["damaged"], "state"] = "damaged, see above"
# What one compares comes first, so that it is in sight on a narrow screen.
first = [*(n for n in ("run", "layer", "place", "l0", "fvu", "measured", "ce_recovered", "dead") if n in rows), "state"]
rows = rows.reindex(columns=[*first, *(name for name in rows if name not in {*first, "damaged"})])
rows["run"] = rows["run"].map(viz.visible)
for share in {"ce_recovered", "dead"}.intersection(rows.columns):
    rows[share] = 100 * rows[share].astype(float)
config = {
    "run": st.column_config.TextColumn("run", pinned=True, width=200),
    "layer": st.column_config.NumberColumn("layer", format="%d", width=60, help="that the SAE writes to"),
    "place": st.column_config.TextColumn("place", width=190, help="that the SAE reads, and → writes to; in its layer"),
    "d_sae": st.column_config.NumberColumn("latents", format="localized"),
    "l0": st.column_config.NumberColumn("L0", format="%.1f", help=workspace.FORMULAS["l0"]),
    "fvu": st.column_config.NumberColumn("FVU", format="%.4f", help=workspace.FORMULAS["fvu"]),
    "ce_recovered": st.column_config.NumberColumn(
        "CE recovered", format="%.1f %%", help=f"{workspace.FORMULAS['ce_recovered']}; ablation to zero"
    ),
    "dead": st.column_config.NumberColumn("dead", format="%.1f %%", help=workspace.FORMULAS["dead"]),
    "measured": st.column_config.TextColumn(
        "measured on", help="Held-out text; or the last training batch, whose numbers compare with no others"
    ),
    "index": st.column_config.CheckboxColumn("index", help="Whether the feature index is complete"),
}


def choose() -> None:
    """The row's SAE becomes the one of all pages. Runs that have no weights yet can only be looked at here."""
    if name := tables.picked_row(st.session_state["overview_table"], names):
        if found.runs[name].has_weights:
            st.session_state["run"] = name
        st.session_state["overview_run"] = (name, st.session_state.get("run"))


st.dataframe(
    rows,
    hide_index=True,
    column_config=config,
    on_select=choose,
    selection_mode=tables.CLICK,
    key="overview_table",
    height="content" if len(rows) <= 20 else 620,
    placeholder="–",
    alt="The runs below the folder with their numbers; choose a row to work with that SAE",
)
st.caption("Click a row to work with that SAE on all pages.")
name, beside = st.session_state.get("overview_run", (None, None))
if name not in found.runs or beside != st.session_state.get("run"):
    name = st.session_state.get("run") or names[0]  # that of the sidebar
chosen = found.runs[name]

left, right = st.columns([3, 2], gap="large")
with left:
    st.subheader("Sparsity against fidelity", anchor=False)
    y = st.segmented_control(
        "fidelity",
        ["fvu", "ce_recovered"],
        default="fvu",
        required=True,
        format_func=workspace.TITLES.__getitem__,
        label_visibility="collapsed",
        **session.held("overview_fidelity", "fvu", workspace.TITLES.__getitem__),
    )
    title = workspace.TITLES[y]
    others = st.toggle(
        "also numbers of training rows",
        help="Hollow points: of the last training batch, or of an evaluation on other rows than the held-out ones. An "
        "SAE fits the rows it was trained on better, so they cannot be compared with held-out numbers; "
        "`saelab evaluate RUN --cache CACHE` measures a run on held-out text.",
        **session.held("overview_training", False),
    )
    # Numbers of two models, or of two places of one, say nothing about each other.
    where = workspace.model_and_place(chosen)
    alike = [run for run in found.runs.values() if workspace.model_and_place(run) == where]
    points = workspace.pareto_points(alike, y, training=others)
    if points:
        page.chart(
            viz.pareto(points, page.colours(), y=title),
            alt=f"{title} against L0 for every run of the place",
            key="pareto",
        )
        st.caption(
            "Measured on held-out tokens; bars are 95 % intervals."
            + (" Hollow: training rows, which are not held out." if others else "")
            + (f" Only SAEs of {viz.markdown(' at '.join(filter(None, where)))}." if len(alike) < len(names) else "")
        )
    else:
        st.caption("No run has this number on held-out text yet; `saelab evaluate RUN --cache CACHE` measures it.")
    depths = workspace.depth_points(found.runs.values(), y, training=others) if several else {}
    if depths:
        st.subheader("Quality by depth", anchor=False)
        page.chart(viz.by_layer(depths, page.colours(), title), alt=f"{title} against the layer", key="depth")
with right:
    st.subheader("Where the numbers come from", anchor=False)
    st.markdown(f"**{viz.markdown(page.run_title(chosen))}**")
    with page.part():
        source_parts.of_run(chosen)
    settings = {k: v for k, v in chosen.settings.items() if isinstance(v, str | int | float | bool)}
    with st.expander("Settings and training"):
        source_parts.commands(workspace.train_command(chosen))
        trained = chosen.metadata.get("train") or {}
        page.html(viz.fact_table([(name, f"{value}", "") for name, value in {**settings, **trained}.items()]))

evidence.controls(chosen)
if chosen.has_index:
    st.subheader("How often latents fire", anchor=False)
    with page.part():
        densities = per_latent(loaders.need_index(chosen).table(), "density")  # both poles of a latent together
        page.chart(
            viz.density_histogram({chosen.name: densities}, page.colours()),
            alt="Histogram of the latents' firing densities",
            key="overview_density",
        )

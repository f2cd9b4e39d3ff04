"""Which latents are dead, dying or always on, and why."""

import loaders
import session
import streamlit as st
from parts import health as health_parts
from parts import source as source_parts

from saelab import viz
from saelab.features.health import AUDIT
from saelab.features.search import STATES, count_states
from saelab.runs import Run


def percent(share: float) -> str:
    return f"{share:.0%}"


def not_beside(other: Run) -> str:
    return "it is the SAE that is open" if other.name == run.name else "it has no feature index"


st.title("Health", anchor=False)
run = session.need_run()
index = loaders.need_index(run)
table = loaders.catalogue(run)
counts = count_states(table)
with st.container(horizontal=True):
    for name, help_text in STATES.items():
        share = counts[name] / index.d_sae
        st.metric(
            name, f"{counts[name]:,}", f"{share:.1%}", delta_color="off", delta_arrow="off", help=help_text, width=100
        )
    st.metric("latents", f"{index.d_sae:,}", width=80)
    st.metric("tokens counted", f"{index.meta['tokens']:,}", width=115)
    source_parts.of_index(run, index, ("count", "density", *AUDIT))

# What is in a tab is computed when that is opened: the causes of many deaths take seconds.
density_tab, dead_tab, dense_tab = st.tabs(
    ["Firing densities", f"Dead ({counts['dead']:,})", "Always on"], key="health_tab", on_change="rerun"
)
if density_tab.open:
    with density_tab:
        others = [name for name, other in loaders.workspace().runs.items() if other.has_index and name != run.name]
        session.say_left_out("health_beside", others, not_beside)
        beside = st.multiselect(
            "beside",
            others,
            format_func=viz.visible,
            placeholder="other SAEs",
            **session.held("health_beside", [], viz.visible),
        )
        health_parts.densities(run, beside)

if dead_tab.open:
    with dead_tab:
        health_parts.dead(run, index, table, counts["dead"])

if dense_tab.open:
    with dense_tab:
        limit = st.select_slider(
            "denser than",
            [0.02, 0.05, 0.1, 0.2, 0.5],
            value=0.1,
            format_func=percent,
            width=420,
            **session.held("health_limit", 0.1, percent),
        )
        health_parts.audit(index, limit)

"""Evaluations of steering below the folder: scores, verdicts, and the answers behind them."""

from typing import Any

import loaders
import page
import pandas as pd
import session
import streamlit as st

from saelab import viz
from saelab.layout import STEER_EVAL
from saelab.steering.evaluation.report import read_report
from saelab.viz import steer_eval as figures

st.title("Steering evaluation", anchor=False)
found = loaders.workspace()
name = st.session_state.get("run", "run")
command = f"saelab steer-eval {name} --out {name}-steering"
if not found.steer_evals:
    st.info(
        "No evaluation below this folder yet. One that compares a latent with prompting, a difference of means, a "
        f"probe and random directions is made with\n\n    {command}",
        icon=":material/info:",
    )
    st.stop()
chosen = st.selectbox(
    "evaluation", list(found.steer_evals), key="steer_eval", format_func=viz.visible, width=320, **session.KEEP
)
result = read_report(found.steer_evals[chosen] / STEER_EVAL)
for line in figures.remarks(result):
    st.caption(viz.markdown(line))
if result.get("curves"):
    page.chart(
        figures.concept_against_fluency(result, page.colours()),
        "Concept against fluency, one line per method over its strengths",
        key="steer_eval_curves",
    )
    st.caption(figures.NOTE)
    st.subheader("Scores", anchor=False)
    st.dataframe(pd.DataFrame(figures.mean_rows(result)), hide_index=True)
    st.subheader("Differences", anchor=False)
    st.dataframe(pd.DataFrame(figures.difference_rows(result)), hide_index=True)

examples = pd.DataFrame(result.get("examples", []))
if len(examples):
    st.subheader("Answers", anchor=False)
    with st.container(horizontal=True):
        concept = st.selectbox("concept", sorted(set(examples["concept_name"])), key="steer_eval_concept", width=220)
        method = st.selectbox("method", ["all", *dict.fromkeys(examples["method"])], key="steer_eval_method", width=220)
    shown: Any = examples[examples["concept_name"] == concept]
    if method != "all":
        shown = shown[shown["method"] == method]
    columns = ["method", "instruction_text", "text", "concept", "instruction", "fluency", "overall"]
    st.dataframe(
        shown[columns].map(lambda value: viz.visible(value) if isinstance(value, str) else value),
        hide_index=True,
        column_config={
            "instruction_text": st.column_config.TextColumn("asked", width="medium"),
            "text": st.column_config.TextColumn("answer", width="large"),
        },
    )
st.caption("Made with")
st.code(command, language="bash")

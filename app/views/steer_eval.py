"""Evaluations of steering below the folder: scores, verdicts, and the answers behind them."""

from typing import Any

import loaders
import page
import pandas as pd
import session
import streamlit as st
from parts import evaluating
from parts import source as source_parts

from saelab import viz, workspace
from saelab.layout import STEER_EVAL
from saelab.steering.evaluation.report import read_report
from saelab.viz import steer_eval as figures

st.title("Steering evaluation", anchor=False)
found = loaders.workspace()
name = st.session_state.get("run")
command = f"saelab steer-eval {name or 'RUN'} --out {name or 'run'}-steering"
if name in found.runs:
    with page.part():
        evaluating.form(found.runs[name], opened=not found.steer_evals)
if not found.steer_evals:
    st.info(
        "No evaluation below this folder yet. One compares a latent with prompting, a difference of means, a probe and "
        f"random directions. On the command line it is made with\n\n    {command}",
        icon=":material/info:",
    )
    st.stop()
session.say_unknown("steer_eval", found.steer_evals)
chosen = st.selectbox(
    "evaluation",
    list(found.steer_evals),
    format_func=viz.visible,
    width=320,
    **session.held("steer_eval", next(iter(found.steer_evals)), viz.visible),
)
result = read_report(found.steer_evals[chosen] / STEER_EVAL)
if name in found.runs:
    with page.part():
        evaluating.go_on(found.runs[name], found.steer_evals[chosen], result)
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
        named = sorted(set(examples["concept_name"]))
        concept = st.selectbox("concept", named, width=220, **session.held("steer_eval_concept", named[0]))
        methods = ["all", *dict.fromkeys(examples["method"])]
        method = st.selectbox("method", methods, width=220, **session.held("steer_eval_method", "all"))
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
source_parts.commands(workspace.steer_eval_command(result, chosen))

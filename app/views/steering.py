"""The steering bench: latents and vectors, what to do with each, and what the model then says."""

import common
import steering_parts
import streamlit as st

from saelab import viz
from saelab.workspace import bench

st.title("Steering", anchor=False)
run = common.need_run()
model = common.need_model(run, "Steering")
source = bench.open_run(run, common.sae(run))
picks = steering_parts.picks(run, source)

left, right = st.columns([2, 3], gap="large")
with left:
    st.subheader("What to change", anchor=False)
    steering_parts.add_latent(run, source)
    steering_parts.add_means(run, source, model)
    picks = steering_parts.edit(run, picks)
with right:
    st.subheader("What the model says", anchor=False)
    with st.form("steering_form", border=False):
        prompt = st.text_area("Prompt", "The weather today", key="steering_prompt", height=70)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            length = st.number_input("new tokens", 1, 400, 40, key="steering_length", width=130)
            temperature = st.number_input("temperature", 0.0, 2.0, 0.0, 0.1, key="steering_temperature", width=130)
            seed = st.number_input("seed", 0, 10_000, 0, key="steering_seed", width=110)
            asked = st.form_submit_button("Generate", icon=":material/play_arrow:", type="primary", disabled=not picks)
    if not picks:
        st.caption("Pick a latent, or make a vector from two sets of texts.")
    if asked and picks:
        options = {"max_new_tokens": int(length), "temperature": float(temperature), "seed": int(seed)}
        st.session_state["steering_result"] = (run.name, steering_parts.generate(model, source, picks, prompt, options))
    name, result = st.session_state.get("steering_result", (None, None))
    if name == run.name:
        steering_parts.show(result)

if picks:
    st.subheader("Dose and response", anchor=False)
    steering_parts.doses(run, model, picks)
    steering_parts.save(run, source, model, picks, prompt)
st.subheader("Library", anchor=False)
rows = bench.saved_recipes(common.workspace().root)
if not rows:
    st.caption(f"Saved recipes appear here; they lie in `{viz.visible(common.workspace().root.name)}/{bench.RECIPES}`.")
else:
    steering_parts.library(rows)

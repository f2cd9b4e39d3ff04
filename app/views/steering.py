"""The Steering page: latents and vectors, what to do with each, and what the model then writes."""

import loaders
import session
import streamlit as st
from parts import doses, talk
from parts import recipes as recipe_parts
from parts import steering as steering_parts

st.title("Steering", anchor=False)
run = session.need_run()
steer_tab, recipes_tab = st.tabs(["Steer", "Recipes"])
with recipes_tab:
    # First, because a page without a language model ends below.
    recipe_parts.show(run)

with steer_tab:
    model = loaders.need_model(run, "Steering")
    loaders.sae(run)  # shows that it is being loaded
    source = loaders.opened(run)
    picks = steering_parts.picks(run, source)
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.subheader("What to change", anchor=False)
        steering_parts.add_latent(run, source)
        steering_parts.add_means(run, source, model)
        steering_parts.calibrate_new(run, source, model, picks)
        picks = steering_parts.edit(run, source, model, picks)
        steering_parts.share(run, picks)
    with right:
        st.subheader("What the model says", anchor=False)
        prompt = talk.section(run, source, model, picks)
    if picks:
        st.subheader("Dose and response", anchor=False)
        doses.doses(run, model, picks)
        recipe_parts.save(run, source, model, picks, prompt)

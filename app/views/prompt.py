"""A text seen through the SAE: active latents per token, what is lost, and why each latent won."""

import loaders
import numpy as np
import page
import session
import streamlit as st
from parts import prompt as prompt_parts

from saelab import viz

EXAMPLE = "The river runs past the old mill, and the weather today is grey."

st.title("Prompt", anchor=False)
run = session.need_run()
with st.form("prompt_form", border=False):
    text = st.text_area("Text", EXAMPLE, key="prompt_text", height=80, **session.KEEP)
    with st.container(horizontal=True, vertical_alignment="center"):
        asked = st.form_submit_button("Read", icon=":material/play_arrow:", type="primary")
        gradients = st.toggle(
            "with gradients",
            key="prompt_gradients",
            help="Also compute the loss's gradient: which latents matter to the next token, not only which are active",
            **session.KEEP,
        )
name, reading = st.session_state.get("prompt_reading", (None, None))
if asked or (reading is not None and name != run.name):
    # Another SAE gets the same text at once, so that SAEs can be compared.
    reading = loaders.read_text(run, text, "Reading a prompt", gradients)
    st.session_state["prompt_reading"] = (run.name, reading)
if reading is None:
    loaders.need_model(run, "Reading a prompt")
    st.caption("Type a text and press Read.")
    st.stop()

colours = page.colours()
lost, counts = reading.unexplained(), reading.l0()
layer = st.segmented_control(
    "Colour by",
    ["unexplained", "active latents", "one latent"],
    default="unexplained",
    required=True,
    key="prompt_layer",
    **session.KEEP,
)
if layer == "one latent":
    strongest = [latent for latent, _ in reading.strongest(30)]
    if not strongest:
        st.caption("No latent is active on this text.")
        st.stop()
    latent = st.selectbox("latent", strongest, format_func=lambda j: f"#{j}", key="prompt_latent", width=160)
    page.html(viz.token_strip(reading.strings, reading.trace(latent), colours))
elif layer == "active latents":
    page.html(viz.token_strip(reading.strings, [float(c) for c in counts], colours, unit="active latents"))
else:
    counted = lost[reading.first :] or lost
    page.html(viz.token_strip(reading.strings, lost, colours, scale=max(counted), unit="share of squared norm lost"))
    st.caption(
        f"‖x − x̂‖² / ‖x‖² per token: 0 is a perfect reconstruction, 1 is as good as nothing. Here from "
        f"{min(counted):.1%} to {max(counted):.1%}, the full tint; point at a token to read its own."
    )

best = reading.strongest(14)
if best:
    st.subheader("Strongest latents", anchor=False)
    rows = np.array([reading.trace(latent) for latent, _ in best])
    figure = viz.heatmap(rows, prompt_parts.names(run, best), reading.strings, colours)
    page.chart(figure, alt="Activation of the strongest latents on each token", key="prompt_heatmap")

st.subheader("One token", anchor=False)
position = st.pills(
    "token",
    range(reading.n),
    default=min(reading.first + 1, reading.n - 1),
    required=True,
    key="prompt_position",
    format_func=lambda i: f"{i} {viz.markdown(reading.strings[i].strip() or ('␣' if reading.strings[i] else '·'))}",
    label_visibility="collapsed",
)
position = min(position, reading.n - 1)
facts = [f"{counts[position]} active latents", f"{lost[position]:.1%} of the squared norm lost"]
st.caption(" · ".join(facts))
left, right = st.columns([1, 1], gap="large")
with left:
    chosen = prompt_parts.active_table(run, reading, position)
with right:
    prompt_parts.why(run, reading, position)
if chosen is not None and st.button(f"Open latent #{chosen[0]}", icon=":material/open_in_full:", key="prompt_open"):
    session.open_latent(*chosen)
if reading.grads is not None:
    prompt_parts.effects(run, reading, position)

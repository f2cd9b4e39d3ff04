"""A text seen through one or more SAEs: which latents tell something of it, what is lost, and why each one won."""

import loaders
import session
import streamlit as st
from parts import prompt as prompt_parts

EXAMPLE = "The river runs past the old mill, and the weather today is grey."
MOST = 3  # SAEs beside each other

st.title("Prompt", anchor=False)
run = session.need_run()
with st.form("prompt_form", border=False):
    text = st.text_area("Text", EXAMPLE, height=80, **session.held_text("prompt_text", EXAMPLE))
    with st.container(horizontal=True, vertical_alignment="center"):
        asked = st.form_submit_button("Read", icon=":material/play_arrow:", type="primary")
        gradients = st.toggle(
            "with gradients",
            help="Also compute the loss's gradient: which latents matter to the next token, not only which are active",
            **session.held("prompt_gradients", False),
        )
session.say_unshared("prompt_text")
asking = (run.name, run.stamp, text, gradients)
question, reading = st.session_state.get("prompt_reading", (None, None))
# An address leaves out what is the default, so that of the example's reading may hold the token or the ranking alone.
linked = reading is None and any(key == "token" or key.startswith("prompt_") for key in st.query_params)
if asked or linked or (reading is not None and question != asking):
    # Another SAE, one that was trained again, and a text that Back or a link brings, are read at once: what is shown
    # belongs to the form above it.
    reading = loaders.read_text(run, text, "Reading a prompt", gradients)
    st.session_state["prompt_reading"] = (asking, reading)
if reading is None:
    loaders.need_model(run, "Reading a prompt")
    st.caption("Type a text and press Read.")
    st.stop()
if reading.cut:
    st.warning(
        f"Only the first {reading.n:,} tokens were read; {reading.cut:,} more are not shown.", icon=":material/cut:"
    )

how, position = prompt_parts.choose_ranking(run, reading)
prompt_parts.coloured_text(run, reading, position, how)

st.subheader("Latents on this text", anchor=False)
others = [other for other in loaders.siblings(run, most=1000) if loaders.reads_alike(run, other)]
beside = []
session.say_left_out("prompt_beside", others, lambda other: prompt_parts.not_beside(run, other))
if others:
    beside = st.multiselect(
        "other SAEs beside it",
        others,
        max_selections=MOST - 1,
        placeholder="other SAEs beside it",
        label_visibility="collapsed",
        **session.held("prompt_beside", []),
    )
if beside:
    prompt_parts.side_by_side([run, *(loaders.workspace().run(other) for other in beside)], reading, how)
else:
    prompt_parts.strongest(run, reading, position, how)

st.subheader(f"Token {position}: {prompt_parts.quoted(reading.strings[position])}", anchor=False)
counts, lost = reading.l0(), reading.unexplained()
st.caption(f"{counts[position]} active latents · {lost[position]:.1%} of the squared norm lost")
left, right = st.columns([1, 1], gap="large")
with left:
    chosen = prompt_parts.active_table(run, reading, position, how)
with right:
    prompt_parts.why(run, reading, position)
if chosen is not None and st.button(f"Open latent #{chosen[0]}", icon=":material/open_in_full:", key="prompt_open"):
    session.open_latent(*chosen)
if reading.grads is not None:
    prompt_parts.effects(run, reading, position)

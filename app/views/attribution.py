"""The Attribution page: what caused the next token, which latents fed which, and the text without them."""

import loaders
import page
import session
import streamlit as st
from parts import attribution as parts

from saelab import viz

EXAMPLE = "The capital of France is"

st.title("Attribution", anchor=False)
run = session.need_run()
others = parts.companions(run)


def placed(name: str) -> str:
    return viz.visible(f"{name} · {others[name].hook_name}")


with st.form("attribution_form", border=False):
    prompt = st.text_area("Prompt", EXAMPLE, height=70, **session.held_text("attribution_prompt", EXAMPLE))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        target = st.text_input(
            "token to explain",
            placeholder="the likeliest",
            help="With its space, as in ' Paris'; of a longer text the first token",
            width=170,
            **session.held_text("attribution_target"),
        )
        against = st.text_input(
            "against",
            placeholder="nothing",
            help="Another token: the difference of the two logits is explained",
            width=150,
            **session.held_text("attribution_against"),
        )
        integrated = st.number_input(
            "path steps",
            0,
            64,
            0,
            help="Steps of integrated gradients; 0 takes activation × gradient",
            width=130,
            **session.held("attribution_steps", 0),
        )
        most = st.number_input(
            "most nodes",
            10,
            2000,
            120,
            10,
            help="Latents and error terms to keep, over all places",
            width=140,
            **session.held("attribution_most", 120),
        )
        kept = st.slider(
            "share of influence to keep", 0.2, 1.0, 0.8, 0.05, width=220, **session.held("attribution_keep", 0.8)
        )
        asked = st.form_submit_button("Explain", icon=":material/play_arrow:", type="primary")
    session.say_left_out("attribution_also", others, lambda other: parts.not_beside(run, other))
    also = st.multiselect(
        "SAEs at other places of the same model",
        list(others),
        format_func=placed,
        disabled=not others,
        placeholder="none" if others else "there is none in this folder",
        **session.held("attribution_also", [], placed),
    )
session.say_unshared("attribution_prompt", "attribution_target", "attribution_against")
chosen = [run, *(others[name] for name in also)]
settings = {"integrated": int(integrated), "keep": float(kept), "max_nodes": int(most)}
asking = (prompt, target, against, settings)
if asked:
    graph = parts.explain(chosen, prompt, target, against, settings)
    st.session_state["attribution"] = parts.Explained({r.name: r.stamp for r in chosen}, asking, graph)
held: parts.Explained | None = st.session_state.get("attribution")
if held is None or run.name not in held.stamps:
    loaders.need_model(run, "Attribution")
    st.caption("Type a prompt and press Explain.")
    st.stop()

graph, changed = held.graph, held.changed()
if changed:
    named = ", ".join(viz.markdown(name) for name in changed)
    st.warning(f"{session.CHANGED} ({named}). Press Explain to trace it again.", icon=session.OUTDATED)
elif held.asking != asking or [*held.stamps] != [r.name for r in chosen]:
    st.warning("The settings have changed since. Press Explain to trace it again.", icon=session.OUTDATED)
parts.headline(graph)
node = parts.figure(graph, current=not changed)
parts.details(graph, node, current=not changed)
left, right = st.columns([3, 2], gap="large")
with left:
    st.subheader("Latents", anchor=False)
    picked = parts.table(graph)
with right:
    st.subheader("Checks", anchor=False)
    page.html(parts.checks(graph))
    st.caption(
        "Influence: summed magnitudes of effects; the error terms hold the whole activation of the first token. "
        "Effect: activation × (decoder row · gradient of the explained number), what the latent adds to it on that "
        "token, to first order and along all paths; direct: along paths that avoid the other SAEs. Ablated, of the "
        "strongest: how far the number falls when the latent alone is set to zero on that token."
    )
if not changed:  # its latents are those of other weights
    st.subheader("Without them", anchor=False)
    parts.intervene(run, graph, picked)

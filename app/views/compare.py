"""Two SAEs of one hook point: what they share, what one splits or absorbs, what only one of them has."""

import loaders
import page
import session
import streamlit as st
from parts import latent as latent_parts
from parts import tables

from saelab import viz
from saelab.workspace.relatives import apart, other_model, same_start, seed_of

MEANINGS = {
    "shared": "matched one to one with a similarity of at least 0.7",
    "split": "latents of the other side have half of their firings where it fires, and together cover half of its own",
    "absorbed": "one latent of the other side fires on at least half of its tokens",
    "only-left": "nothing on the right comes near",
    "only-right": "nothing on the left comes near",
    "dead": "it never fires on the tokens compared",
}
BY_COSINE = {
    "split": "two or more latents of the other side have a decoder cosine of at least 0.5 with it",
    "absorbed": "one latent of the other side has a decoder cosine of at least 0.5 with it",
}

st.title("Compare", anchor=False)
run = session.need_run()
others = loaders.siblings(run, most=1000)


def described(name: str) -> str:
    """An SAE of the menu, with what it has in common with the left one from the start."""
    seed = seed_of(others[name])
    start = ", same start" if same_start(run, others[name]) else ""
    return f"{viz.visible(name)} ({'seed unknown' if seed is None else f'seed {seed}'}{start})"


session.say_left_out("compare_right", others, lambda other: apart(run, other))
session.renew("compare_right", described, others)
if not others:
    st.info(
        "Comparing needs a second SAE on the same hook point in this folder; train one with another seed or variant.",
        icon=":material/info:",
    )
    st.stop()
if st.session_state.get("compare_right") not in others:
    st.session_state.pop("compare_right", None)  # of another SAE on the left
with st.container(horizontal=True, vertical_alignment="center"):
    st.markdown(f"Left **{viz.markdown(page.run_title(run))}**, right", width="content")
    name = st.selectbox(
        "right",
        list(others),
        format_func=described,
        label_visibility="collapsed",
        **session.held("compare_right", next(iter(others)), described),
    )
    other = others[name]
    asked = st.button("Compare", icon=":material/compare_arrows:", type="primary", key="compare_go")
if same_start(run, other):
    st.warning(
        f"Both SAEs began with the same directions (seed {seed_of(run)}). What they share may come from that start and "
        "not from the data; compare SAEs of different seeds to see what would be found again.",
        icon=":material/content_copy:",
    )
if other_model(run, other):
    st.warning(
        f"These are SAEs of two models, {viz.markdown(str(run.model_name))} and {viz.markdown(str(other.model_name))}. "
        "Unless one was trained from the other, their directions have nothing in common but chance.",
        icon=":material/call_split:",
    )
found = loaders.matching(run, other, asked)
if found is None:
    st.caption(
        f"Matches {run.d_sae:,} with {other.d_sae:,} latents when you press Compare: seconds for a few thousand, a "
        "minute for 65,000."
    )
    st.stop()
counts = found.counts()
meanings = MEANINGS if found.tokens else {**MEANINGS, **BY_COSINE}
for column, (side, number), named in zip(st.columns(2, gap="medium"), counts.items(), (run, other)):
    with column:
        st.markdown(f"**{side.capitalize()}**: {viz.markdown(page.run_title(named))}, {named.d_sae:,} latents")
        with st.container(horizontal=True):
            for status in MEANINGS:
                if status in number:
                    st.metric(status, f"{number[status]:,}", help=meanings[status], width=85)
chance = loaders.chance(run, other)
st.caption(f"A random direction has a cosine of {chance:.2f} with the closest latent on the right.")
st.caption(
    f"Similarity: the mean of decoder cosine and activation correlation over the first {found.tokens:,} tokens of "
    "their cache; pairs by the Hungarian method. In Python: `saelab.comparison.match_saes`."
    if found.tokens
    else "Similarity: decoder cosine; pairs by the Hungarian method. With the cache of both in this folder, "
    "activations would be compared as well. In Python: `saelab.comparison.match_saes`."
)
left, right = (loaders.catalogue(side) if side.has_index else None for side in (run, other))
if not found.tokens and (silent := tables.silent_pairs(found.pairs, (left, right))):
    st.caption(
        f"In {silent:,} of the {len(found.pairs):,} shared pairs a latent never fired when it was indexed. Dead "
        "latents keep the directions that they began with: with the same start they match, and mean nothing."
    )
view = st.segmented_control(
    "show",
    ["matched pairs", "unmatched left", "unmatched right"],
    default="matched pairs",
    required=True,
    label_visibility="collapsed",
    **session.held("compare_view", "matched pairs"),
)
signed = loaders.sae(run).signed, loaders.sae(other).signed
pair = tables.pairs(found, view, "compare_table", (left, right), signed)
if pair is None:
    st.caption("None.")
    st.stop()
ends = ((run, pair.left, pair.left_pole), (other, pair.right, pair.right_pole))
for column, (side, latent, pole) in zip(st.columns(2, gap="medium"), ends):
    with column:
        st.caption(viz.markdown(page.run_title(side)))
        if latent < 0:
            st.caption("No counterpart on this side.")
        elif not side.has_index:
            st.caption(f"Latent #{latent}; {viz.markdown(side.name)} has no feature index.")
        else:
            index = loaders.need_index(side)
            latent_parts.preview(side, index, latent, pole if pole in index.poles else 1, key=f"compare_{side.name}")

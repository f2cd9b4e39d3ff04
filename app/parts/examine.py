"""What a latent's page shows beyond the index: the reader's own text, groups of firings, whole contexts, all logits."""

from __future__ import annotations

import json
import os
from typing import Any

import loaders
import numpy as np
import page
import pandas as pd
import session
import streamlit as st

from parts import latent as latent_parts
from saelab import viz
from saelab.data.cache import ActivationCache
from saelab.features.contexts import different_documents, whole_contexts
from saelab.runs import Run
from saelab.workspace import steering

BANDS = {"q75": (0.75, 1.0), "q50": (0.5, 0.75), "q25": (0.25, 0.5), "q00": (0.0, 0.25)}
SHOWN = 10
PINNED = "Kept while you read: every latent's page shows where it fires on this text."


def own_text(run: Run, index: Any, latent: int, poles: tuple[int, ...]) -> None:
    """The reader's pinned text, and where the latent fires on it. Needs the language model."""
    with st.expander(
        "My text",
        icon=":material/push_pin:",
        expanded=bool(st.session_state.get("pinned") or "pinned" in st.query_params),
    ):
        text = st.text_area("Text", height=70, placeholder=PINNED, **session.held_text("pinned"))
        session.say_unshared("pinned")
        if not (text or "").strip():
            return
        if loaders.model_name(run) is None:
            st.caption("This needs the language model; start the app with `--model NAME`.")
            return
        key = (run.name, run.stamp, text)
        kept = st.session_state.get("pinned_read")
        if kept is None or kept[0] != key:
            with page.part():
                read = loaders.read_text(run, text, "Reading your text", gradients=True)
                st.session_state["pinned_read"] = (key, read)
        kept = st.session_state.get("pinned_read")
        if kept is None or kept[0] != key:
            return
        read = kept[1]
        trace = [0.0] * read.first + read.trace(latent)[read.first :]
        largest = max(index.max_activation(latent, pole) for pole in poles)
        weaker = latent_parts.below(index, latent)
        losses = None if read.grads is None else read.loss_without(latent, loaders.sae(run))
        page.html(viz.token_strip(read.strings, trace, page.colours(), largest or None, below=weaker, losses=losses))
        best = max(trace, key=abs, default=0.0)
        at = abs(best) / largest if largest else 0.0
        st.caption(f"strongest {best:+.2f}, {at:.0%} of its largest in the corpus" if best else "It is silent here.")


def groups(run: Run, index: Any, latent: int, pole: int, row: dict[str, Any]) -> None:
    """The quarters of its firings, one below the other, each with its share of the magnitude."""
    weaker = latent_parts.below(index, latent)
    shares = magnitude_shares(index.histogram_edges, row["histogram"])
    for kind, (low, high) in BANDS.items():
        found = index.examples(latent, pole, kind)
        if found:
            st.caption(f"**{low:.0%} to {high:.0%}** of its firings by strength: {shares[kind]:.0%} of its magnitude")
            page.html(viz.example_list(found, page.colours(), index.max_activation(latent, pole) or None, weaker))


def magnitude_shares(edges: list[float], counts: Any) -> dict[str, float]:
    """The share of the summed magnitude in each quarter of the firings, from the histogram."""
    counts, middle = np.asarray(counts, float), (np.asarray(edges[1:]) + np.asarray(edges[:-1])) / 2
    if not counts.sum():
        return dict.fromkeys(BANDS, 0.0)
    share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    mass = np.concatenate([[0.0], np.cumsum(counts * middle) / (counts * middle).sum()])
    at = {q: float(np.interp(q, share, mass)) for q in (0.0, 0.25, 0.5, 0.75, 1.0)}
    return {kind: at[high] - at[low] for kind, (low, high) in BANDS.items()}


def top(run: Run, index: Any, latent: int, pole: int) -> None:
    """The strongest examples, of different documents first; with the cache at hand in their whole contexts."""
    found = different_documents(index.examples(latent, pole, "top"))
    cache = cache_of(run, index)
    whole = False
    with st.container(horizontal=True):
        every = len(found) > SHOWN and st.toggle("more examples", **session.held(f"top_more_{pole}", False))
        if cache is not None:
            whole = st.toggle("whole contexts", **session.held(f"top_whole_{pole}", False))
    found = found if every else found[:SHOWN]
    if whole and cache is not None:
        with page.part(), st.spinner("Reading the contexts …"):
            found = whole_contexts(cache, loaders.sae(run), found)
    st.caption(viz.counted(found))
    largest, weaker = index.max_activation(latent, pole) or None, latent_parts.below(index, latent)
    page.html(viz.example_list(found, page.colours(), largest, weaker, breaks=whole))


def cache_of(run: Run, index: Any) -> ActivationCache | None:
    """The cache of the index, if it lies below the folder that is open."""
    wanted = index.meta.get("cache_fingerprint")
    for path in loaders.workspace().caches.values():
        with page.part():
            cache = ActivationCache(path)
            if cache.fingerprint == wanted:
                return cache
    return None


def logits(run: Run, row: dict[str, Any], key: str) -> None:
    """Promoted and suppressed tokens with their values, as a table, and all logits as a histogram on demand."""
    if not row["promoted"]:
        latent_parts.logits(row)
        return
    ends = {}
    for name, word in (("promoted", "promotes"), ("suppressed", "suppresses")):
        ends[word] = [viz.visible(token) for token in row[name]]
        ends[f"{word} by"] = [float(value) for value in row[f"{name}_logits"]]
    number = st.column_config.NumberColumn(format="%+.3f", help="logit change per unit of activation, less the mean")
    config = {name: number for name in ends if name.endswith("by")}
    st.dataframe(
        pd.DataFrame(ends), hide_index=True, column_config=config, alt="Tokens whose logits it raises and lowers most"
    )
    asks = "Asks the language model's unembedding."
    if st.toggle("histogram of all logits", help=asks, **session.held(key, False)):
        direction = row["pole"] * loaders.sae(run).W_dec.detach()[row["latent"]]
        figure = viz.logit_histogram(loaders.logit_effects(run, direction).numpy(), page.colours())
        page.chart(figure, alt="Histogram of the effect on all logits", key=f"{key}_drawn")


def explain(run: Run, index: Any, latent: int, pole: int) -> None:
    """A button that asks the endpoint of ``saelab app --explain-endpoint`` for a description, and scores it."""
    endpoint = os.environ.get("SAELAB_APP_EXPLAIN")
    if endpoint is None or loaders.read_only():
        return
    from saelab.features.explanations import ChatClient, interpret
    from saelab.features.explanations.interpretation import save

    if st.button("Explain", key=f"latent_explain_{pole}", icon=":material/smart_toy:", help=EXPLAIN):
        with page.part():
            with st.spinner("Asking the model …"):
                client = ChatClient(**json.loads(endpoint), api_key=os.environ.get("OPENAI_API_KEY"), retries=1)
                save(loaders.place(run), interpret(index, latent, pole, client))
            st.rerun()


EXPLAIN = "Sends windows of the text to the endpoint that the app was started with, and scores what it answers."


def steer(run: Run, latent: int, pole: int) -> None:
    """Three calibrated strengths beside the control, when asked for: the model is loaded then."""
    from parts import trial

    what = "Three calibrated strengths beside a random control"
    if st.toggle("Try it on the model", help=what, **session.held("latent_trial", False)):
        model, source = loaders.need_model(run, "Steering"), loaders.opened(run)
        trial.panel(run, source, model, steering.pick_latent(source, latent, pole), f"latent_{latent}_{pole}")

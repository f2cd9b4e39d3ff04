"""Pieces of a latent's page that other pages show too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import loaders
import numpy as np
import page
import session
import streamlit as st

from parts import tables
from saelab import viz
from saelab.features.explanations import imported_labels, load
from saelab.features.indexing.labels import POOR
from saelab.features.search import counterparts
from saelab.runs import Run
from saelab.workspace.notes import read_notes, write_note
from saelab.workspace.relatives import same_start, seed_of

LONGEST_TITLE = 44
ROLE = "Only examples that fire on messages of this role."
POSITIVE = ("token_share", "encoder_norm", "decoder_norm")
FACTS = {
    "position_corr": ("position in the context", "correlation with the magnitude"),
    "frequency_corr": ("frequency of the token", "correlation with the log count in the corpus"),
    "first_corr": ("first token of a context", "correlation with the magnitude"),
    "norm_corr": ("norm of the activation", "correlation with the magnitude"),
    "mean_cosine": ("mean activation", "cosine with the direction"),
    "token_share": ("most frequent token", "share of its firings"),
    "encoder_norm": ("encoder", "norm of its column"),
    "encoder_bias": ("encoder bias", "raw units"),
    "decoder_norm": ("decoder", "norm of its row"),
}


def title(row: dict[str, Any], signed: bool, notes: dict[int, dict[str, str]] | None = None) -> str:
    """``#12 −`` and the label: that in ``notes`` (see :func:`names`) before the index's."""
    pole = "" if not signed else (" +" if row["pole"] > 0 else " −")
    label = (notes or {}).get(row["latent"], {}).get("label") or row.get("label")
    if label and len(label) > LONGEST_TITLE:
        label = label[: LONGEST_TITLE - 1] + "…"
    return f"\\#{row['latent']}{pole}" + (f" · {viz.markdown(label)}" if label else "")


def pole_heading(row: dict[str, Any]) -> None:
    """The name of one pole of a signed latent, with the label of that pole: the two stand for different things."""
    st.subheader("Positive pole" if row["pole"] > 0 else "Negative pole", anchor=False)
    if row.get("label"):
        score = row.get("label_score")
        known = "" if score is None or score != score else f" · F1 {score:.2f} as a detector of its firing"
        st.markdown(f"**{viz.markdown(row['label'])}**{known}")


def names(run: Run) -> dict[int, dict[str, str]]:
    """Latent -> ``{"label": ...}`` for titles: the researcher's own, or else an imported one."""
    imported = {latent: {"label": label.text} for latent, label in imported_labels(loaders.place(run)).items()}
    own = {latent: note for latent, note in read_notes(loaders.place(run)).items() if note.get("label")}
    return {**imported, **own}


def numbers(row: dict[str, Any], narrow: bool = False) -> None:
    """The numbers of one pole: in one line of large figures, or of small print where it is narrow."""
    share, entropy = f"{row['density']:.3%}", f"{row['token_entropy']:.1f} bits"
    tokens = f"{row['count']:,} tokens of the corpus"
    if narrow:
        st.caption(
            f"fires on {share} · strongest {row['max']:.2f} · mean {row['mean']:.2f} · token entropy {entropy}",
            help=f"Fires on {tokens}. Magnitudes are in raw units, the mean over the tokens it fires on.",
        )
        return
    with st.container(horizontal=True):
        st.metric("fires on", share, help=f"{tokens}; density = count / indexed tokens", width=90)
        st.metric("strongest", f"{row['max']:.2f}", help="largest magnitude, raw units", width=95)
        st.metric("mean", f"{row['mean']:.2f}", help="mean magnitude where it fires, raw units", width=75)
        st.metric("token entropy", entropy, help="of the tokens it fires on; 0 is a single token", width=120)


def explanation(run: Run, latent: int, pole: int) -> None:
    """The explanation by a language model, with its scores beside those of guessing, and an imported label."""
    label = imported_labels(loaders.place(run)).get(latent) if pole > 0 else None
    if label is not None:
        st.markdown(f":material/label: {viz.markdown(label.text)}")
        by = " · ".join(viz.markdown(part) for part in (label.source, label.explainer, label.method) if part)
        st.caption(f"imported label{': ' if by else ''}{by}")
    found = load(loaders.place(run)).get((latent, pole))
    if found is None:
        return
    st.markdown(f":material/smart_toy: {viz.markdown(found['text'])}")
    scores = [f"{name} {_share(found[name]['balanced_accuracy'])}" for name in ("detection", "fuzzing")]
    st.caption(
        f"by {viz.markdown(found['explainer'])} · balanced accuracy: {', '.join(scores)} (guessing reaches 50 %) · "
        f"accuracy of detection {_share(found['detection']['accuracy'])}, "
        f"of answering no to everything {_share(found['detection']['guess_nothing'])}"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def label_scores(row: dict[str, Any]) -> None:
    """How well the offline label predicts where the latent fires."""
    score, mass = row.get("label_score"), row.get("label_mass")
    if not row.get("label") or score is None or score != score:
        return
    meets = "" if mass is None or mass != mass else f" · meets {mass:.0%} of the magnitude"
    st.caption(
        f"label {viz.markdown(row['label'])}: F1 {score:.2f}{' (a poor guess)' if score < POOR else ''} · precision "
        f"{row['label_precision']:.2f} · recall {row['label_recall']:.2f}{meets}",
        help="As a detector of the tokens that the latent fires on, on contexts that the label was not chosen on.",
    )


def preview(run: Run, index: Any, latent: int, pole: int, key: str, opens: bool = True) -> None:
    """A latent beside a table: what it is, its evidence, and with ``opens`` a button to its page."""
    row = index.latent(latent, pole)
    with st.container(border=True):
        name, button = st.columns([5, 2], vertical_alignment="center") if opens else (st.container(), None)
        name.markdown(f"##### {title(row, len(index.poles) > 1, names(run))}")
        if button is not None and button.button("Open", key=f"{key}_open", width="stretch"):
            session.open_latent(latent, pole, run)
        label_scores(row)
        if not row["count"]:
            silent(index, len(index.poles) > 1)
        else:
            explanation(run, latent, pole)
            numbers(row, narrow=True)
            examples(index, latent, pole, "top", limit=6, key=key)
        logits(row, limit=8)


def silent(index: Any, one_side: bool) -> None:
    """The text for a latent, or a pole, that never fired."""
    side = " on this side" if one_side else ""
    st.info(f"It never fired{side} in {index.meta['tokens']:,} tokens.", icon=":material/bedtime:")


def examples(index: Any, latent: int, pole: int, kind: str, limit: int = 10, key: str = "latent") -> None:
    """Token windows of one kind, on the latent's own scale; of a chat's roles all, or one that is chosen."""
    found = index.examples(latent, pole, kind)
    roles = sorted({example.role for example in found})
    if len(roles) > 1:
        role = st.segmented_control(
            "role", roles, label_visibility="collapsed", help=ROLE, **session.held(f"{key}_role_{pole}")
        )
        found = [example for example in found if role in (None, example.role)]
    found = found[:limit]
    largest, weaker = index.max_activation(latent, pole) or None, below(index, latent)
    page.html(viz.example_list(found, page.colours(), scale=largest, below=weaker))


def below(index: Any, latent: int) -> Callable[[float], float]:
    """The share of the firings of an activation's pole that are weaker than it, from the pole's histogram."""
    shares = {}
    for pole in index.poles:
        counts = np.asarray(index.latent(latent, pole)["histogram"], float)
        shares[pole] = np.concatenate([[0.0], np.cumsum(counts) / max(counts.sum(), 1.0)])

    def weaker(activation: float) -> float:
        share = shares[-1 if activation < 0 and -1 in shares else 1]
        return float(np.interp(abs(activation), index.histogram_edges, share))

    return weaker


def logits(row: dict[str, Any], limit: int = 10) -> None:
    """Tokens the direction promotes and suppresses, as chips."""
    colours = page.colours()
    if not row["promoted"]:
        st.caption("The index was built without a language model, so it has no logit effects.")
        return
    for name, word in (("promoted", "promotes"), ("suppressed", "suppresses")):
        values = [float(v) for v in row[f"{name}_logits"]][:limit]
        page.html(viz.caption(word) + viz.token_chips(row[name][:limit], values, colours))


def histogram(row: dict[str, Any], index: Any, key: str) -> None:
    """Magnitudes over the tokens it fires on, with quantiles."""
    marks = {"median": row["q50"], "95 %": row["q95"]} if row["count"] else {}
    figure = viz.activation_histogram(index.histogram_edges, row["histogram"], page.colours(), row["pole"], marks)
    page.chart(figure, alt="Histogram of the latent's activations", key=key)


def axis(run: Run, latent: int) -> None:
    """One axis or two features?"""
    score = loaders.axis(run, latent)
    icons = {"one axis": ":material/swap_horiz:", "two features": ":material/call_split:"}
    texts = {
        "one axis": "its poles share their contexts: opposite values of one variable",
        "two features": "its poles share a direction, not their contexts",
        "mixed": "its poles share some of their contexts",
        "one-sided": "one side fires too rarely to compare the poles",
        "too few examples": "the index keeps too few examples of a side, or of other text, to compare; build it again",
        "diffuse": "contexts of one pole are no more alike than those of different latents, so there is no verdict",
    }
    number = f" (score {score.score:.2f})" if score.score == score.score else ""
    st.markdown(
        f"{icons.get(score.verdict, ':material/help:')} **{score.verdict}**{number}: {texts[score.verdict]}",
        help="Similarity of windows across the poles over that within one, both less that of unrelated "
        f"windows: between {score.between:.3f}, within {score.within:.3f}, unrelated {score.unrelated:.3f}.",
    )


def facts(rows: dict[int, dict[str, Any]]) -> None:
    """Correlations and weights of each pole."""
    listed = []
    for key, (name, what) in FACTS.items():
        values = [row[key] for row in rows.values()]
        if all(v == v for v in values):  # NaN where it has no meaning
            form = ".3f" if key in POSITIVE else "+.3f"
            text = " / ".join(format(v, form) for v in values)
            listed.append((name, text, what + (" (+ / −)" if len(values) > 1 else "")))
    page.html(viz.fact_table(listed))


def other_saes(run: Run, latent: int) -> None:
    """The closest latent in other SAEs of the folder that read the same activations; a click opens one."""
    others = loaders.siblings(run)
    if not others:
        return
    st.subheader("The same direction in other SAEs", anchor=False)
    rows: list[dict[str, Any]] = []
    ends: list[tuple[Run, int, int]] = []
    for name, other in others.items():
        with page.part():  # a damaged SAE says so, and the others are shown
            row, end = _counterpart(run, latent, other)
            rows.append({"SAE": viz.visible(name), **row})
            ends.append(end)
    if not rows:
        return
    number = st.column_config.NumberColumn
    config = {
        "cosine": number(format="%+.2f", help="of the decoder rows"),
        "by chance": number(format="%+.2f", help="mean cosine of a random direction with its closest latent there"),
        "seed": st.column_config.TextColumn("seed", help="of the initial weights"),
    }
    event = st.dataframe(
        rows,
        hide_index=True,
        column_config=config,
        on_select="rerun",
        selection_mode=tables.CLICK,
        key=f"latent_stability_{latent}",
        alt="The closest latent in other SAEs; choose a row to see it",
    )
    if any(same_start(run, other) for other, *_ in ends):
        st.caption(
            "Rows marked “same start” are of SAEs with the same seed: their latents began as the same directions, so a "
            "high cosine there is no sign that the direction would be found again. Train one with another `--seed`."
        )
    if chosen := tables.picked_row(event, ends):
        session.open_latent(chosen[1], chosen[2], chosen[0])


def _counterpart(run: Run, latent: int, other: Run) -> tuple[dict[str, Any], tuple[Run, int, int]]:
    """The latent of ``other`` that is closest to one of ``run``: what is shown of it, and where it is."""
    own, theirs = loaders.sae(run), loaders.sae(other)
    j, cosine = counterparts(own.W_dec[latent].detach(), {"other": theirs}, own.signed)["other"]
    pole = -1 if theirs.signed and cosine < 0 else 1
    tokens = loaders.need_index(other).latent(j, pole)["top_tokens"] if other.has_index else []
    seed, same = seed_of(other), same_start(run, other)
    row = {
        "seed": "unknown" if seed is None else f"{seed}{' (same start)' if same else ''}",
        "latent": j,
        "cosine": cosine,
        "by chance": loaders.chance(run, other),
        "fires on": " ".join(f"‘{viz.visible(token)}’" for token in tokens),
    }
    return row, (other, j, pole)


def notes_form(run: Run, latent: int) -> None:
    """The researcher's label and note, saved to ``notes.json`` of the run."""
    saved = read_notes(loaders.place(run)).get(latent, {})
    if loaders.read_only():
        st.caption("This app was started with --read-only.")
        page.html(viz.fact_table([(name, saved.get(name, ""), "") for name in ("label", "note") if saved.get(name)]))
        return
    with st.form(f"notes_{latent}", border=False):
        label = st.text_input("My label", value=saved.get("label", ""), key=f"note_label_{latent}")
        note = st.text_area("Note", value=saved.get("note", ""), key=f"note_text_{latent}", height=90)
        if st.form_submit_button("Save", icon=":material/save:"):
            write_note(loaders.place(run), latent, label, note)
            st.toast("Saved", icon=":material/check:")
            st.rerun()  # the title was drawn before


def downloads(run: Run, index: Any, latent: int, rows: dict[int, dict[str, Any]]) -> None:
    """The latent as a page or as data."""
    found = {pole: index.examples(latent, pole) for pole in rows}
    name = f"latent_{latent}"
    document = viz.latent_page(
        f"Latent {latent} of {run.name}", rows, {p: [e for e in es if e.kind == "top"] for p, es in found.items()}
    )
    data = viz.latent_json(rows, found, run=run.name, latent=latent, index=index.meta.get("cache_fingerprint"))
    with st.popover("Export", icon=":material/download:"):
        st.download_button("HTML", document, f"{name}.html", "text/html", key="export_html", on_click="ignore")
        st.download_button("JSON", data, f"{name}.json", "application/json", key="export_json", on_click="ignore")

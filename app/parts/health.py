"""Pieces of the Health page."""

from __future__ import annotations

from collections import Counter
from typing import Any

import loaders
import page
import pandas as pd
import session
import streamlit as st

from parts import latent as latent_parts
from parts import tables
from saelab import viz
from saelab.errors import UserError
from saelab.features import FeatureIndex, health
from saelab.features.search import per_latent
from saelab.metrics import zipf_fit
from saelab.runs import Run

ZIPF_SHARE = 0.8
SHORTFALL = "smallest distance to its own threshold, where each latent has one; else to an activation that did win"


def densities(run: Run, beside: list[str]) -> None:
    """Density histograms and ranks of several SAEs, with the Zipf law fitted to each."""
    runs = [run, *(loaders.workspace().run(name) for name in beside)]
    found = {r.name: per_latent(loaders.catalogue(r), "density") for r in runs}
    left, right = st.columns(2, gap="large")
    with left:
        figure = viz.density_histogram(found, page.colours(), height=320)
        page.chart(figure, alt="Histogram of firing densities, dead latents at -10", key="health_density")
    fits, notes = {}, []
    for name, density in found.items():
        try:
            fit = zipf_fit(density, ZIPF_SHARE, offset=False)
        except UserError as error:
            notes.append(f"{name}: {error}")
            continue
        fits[name] = (fit.log_C, fit.s)
        notes.append(f"{name}: Zipf exponent {fit.s:.2f}, R² {fit.r2:.3f} over the first {fit.last_rank:,} ranks")
    with right:
        figure = viz.firing_rank(found, page.colours(), fits)
        page.chart(figure, alt="Firing density by rank with the fitted Zipf law", key="health_rank")
    law = f"Zipf's law: density = C rank⁻ˢ, fitted to the {ZIPF_SHARE:.0%} of living latents that fire most"
    st.caption(viz.markdown(". ".join([law, *notes])))


@st.cache_data(max_entries=8, show_spinner="Looking for causes of death …")
def _deaths(path: str, stamp: tuple[float, ...], _run: Run, _table: pd.DataFrame) -> pd.DataFrame:
    return health.causes_of_death(loaders.sae(_run), per_latent(_table, "count"), loaders.workspace().cache_of(_run))


def deaths(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Cause of death of every dead latent, examined on the run's cache when that lies in the folder."""
    return _deaths(str(run.path), run.stamp, run, table)


def dead(run: Run, index: FeatureIndex, table: pd.DataFrame, count: int) -> None:
    """Dead latents with the cause of each, and the nearest living neighbour of the chosen one."""
    if not count:
        st.success(f"Every latent fired at least once in {index.meta['tokens']:,} tokens.", icon=":material/check:")
        return
    found = deaths(run, table)
    cause_summary(found)
    chosen = death_table(run, found)
    with st.container(width=620):
        if chosen is not None and chosen["neighbour"] >= 0:
            st.markdown(f"Nearest living neighbour of **#{chosen['latent']}**, cosine {chosen['cosine']:+.2f}")
            side = -1 if chosen["cosine"] < 0 and len(index.poles) > 1 else 1
            latent_parts.preview(run, index, int(chosen["neighbour"]), side, key="health_neighbour")


def cause_summary(found: pd.DataFrame) -> None:
    """The number of dead latents by cause."""
    counts = Counter(found["cause"])
    page.html(viz.fact_table((cause, f"{n:,}", health.CAUSES[cause]) for cause, n in counts.most_common()))


def death_table(run: Run, found: pd.DataFrame) -> dict[Any, Any] | None:
    """The table of dead latents; returns the chosen row."""
    known = sorted(found["cause"].unique())
    causes = (
        st.pills("cause", known, selection_mode="multi", **session.held("health_causes", [])) if len(known) > 1 else []
    )
    shown = found[found["cause"].isin(causes)] if causes else found
    shown = shown.dropna(axis="columns", how="all")
    view = shown.assign(gain=100 * shown["gain"]) if "gain" in shown else shown
    number = st.column_config.NumberColumn
    config = {
        "cause": st.column_config.TextColumn("cause", help="the first that applies, as listed above"),
        "neighbour": number("nearest living", format="%d", help="the living latent with the closest decoder row"),
        "cosine": number("cosine", format="%+.2f", help="of the two decoder rows"),
        "encoder_norm": number("encoder norm", format="%.3f", help="norm of its encoder column"),
        "encoder_bias": number("bias", format="%+.3f", help="of its encoder, raw units"),
        "best": number("best", format="%+.3f", help="largest pre-activation over up to 16,384 tokens of the cache"),
        "best_without_bias": number("without bias", format="%+.3f", help="the same without the encoder's bias"),
        "shortfall": number("shortfall", format="%.3f", help=SHORTFALL),
        "gain": number(
            "gain if revived",
            format="%.2f %%",
            help="share of the reconstruction error it would remove, firing beside the others wherever that helps",
        ),
    }
    if "not examined" in known:
        cache = run.metadata.get("cache") or run.metadata.get("cache_fingerprint") or "its own"
        st.caption(
            f"To examine the other causes, put the cache that the SAE was trained on "
            f"({viz.markdown(str(cache))}) into this folder."
        )
    event = st.dataframe(
        view,
        hide_index=True,
        column_config=config,
        on_select="rerun",
        selection_mode=tables.CLICK,
        key="health_deaths",
        placeholder="–",
        alt="Dead latents with the cause of death",
    )
    if any(found["gain"].notna()):
        sae = loaders.sae(run)
        chance = 1 / ((1 if sae.signed else 2) * sae.d_out)
        st.caption(f"A random direction would gain {chance:.2%}.")
    # Something to look at before the first click.
    at = tables.picked_row(event, range(len(shown)))
    return shown.iloc[at or 0].to_dict() if len(shown) else None


def audit(index: Any, limit: float) -> None:
    """Latents that are nearly always on, and the covariate each follows best."""
    found = health.audit_dense(index, limit)
    if found.empty:
        st.success(f"No latent fires on more than {limit:.0%} of tokens.", icon=":material/check:")
        return
    st.caption("Latents that are nearly always on, with the property that the magnitude of each follows most closely.")
    number, meanings = st.column_config.NumberColumn, index.meta["columns"]
    short = {
        "first_corr": "first token",
        "norm_corr": "norm",
        "frequency_corr": "frequency",
        "mean_cosine": "mean act.",
    }
    config = {
        name: number(short.get(name, title), format="%+.2f", width=78, help=f"{title}: {meanings[name]}")
        for name, title in health.AUDIT.items()
    }
    config |= {
        "density": number("density", format="percent", width=75, help=meanings["density"]),
        "strength": number(format="%+.2f", width=75, help="the correlation, or cosine, with what it follows"),
        "mean": number(format="%.2f", width=60, help=meanings["mean"] + ", raw units"),
        "label": st.column_config.TextColumn("label", width=110),
    }
    picked = tables.simple(tables.shown(found, *found.columns), found, "health_audit", config)
    if picked is not None:
        session.open_latent(*picked)

"""A map of all latents by their decoder directions; a click opens one."""

import time

import loaders
import numpy as np
import page
import session
import streamlit as st
from parts import results

from saelab import viz
from saelab.features.projection import MOST, lay_out, save_map
from saelab.workspace import collections

COLOURS = ("label", "density", "score", "collection")
HELP = "t-SNE of the unit decoder rows: only closeness means anything, neither the axes nor the distance of groups do."

st.title("Map", anchor=False)
run = session.need_run()
index = loaders.need_index(run)
table = loaders.catalogue(run)
live = np.unique(table["latent"][table["count"] > 0])
places = loaders.latent_map(run)
if places is None:
    n = min(len(live), MOST)
    st.info(
        f"There is no map of this SAE yet. Laying out its {n:,} latents takes about {max(n // 100, 5)} seconds; "
        "`saelab map RUN` does it too.",
        icon=":material/info:",
    )
    if not loaders.read_only() and st.button("Make the map", type="primary", key="map_make"):
        started = time.monotonic()
        with st.spinner("Laying out the latents …"):
            save_map(loaders.place(run), lay_out(loaders.sae(run), live), loaders.opened(run).fingerprint)
        st.toast(f"Done in {time.monotonic() - started:.0f} s")
        st.rerun()
    st.stop()

by = st.segmented_control(
    "colour", COLOURS, default="label", required=True, help=HELP, **session.held("map_colour", "label")
)
rows = places.merge(table.sort_values("count", ascending=False).drop_duplicates("latent"), on="latent", how="left")
labels = results.about(rows)
points = {"x": rows["x"], "y": rows["y"], "key": rows["latent"].tolist()}
points["text"] = [f"#{latent} {label}" for latent, label in zip(rows["latent"], labels)]
if by == "density":
    shown = np.log10(rows["density"].clip(lower=1e-7)).tolist()
    figure = viz.values_in_plane(points, shown, "log10 density", page.colours())
elif by == "score":
    figure = viz.values_in_plane(points, rows["label_score"].fillna(0.0).tolist(), "F1 of label", page.colours())
else:
    if by == "label":
        group = rows["label"].fillna("").str.split(":").str[0].replace("", "none").to_numpy()
    else:
        known = collections.read_collections(loaders.workspace().root)
        home = {m.latent: c.name for c in known.values() for m in c.members if m.run == run.name}
        group = np.array([home.get(latent, "none") for latent in rows["latent"]])
    masks = {name: group == name for name in sorted(set(group), key=lambda name: (name != "none", name))}
    parts = {name: {k: np.asarray(v)[mask].tolist() for k, v in points.items()} for name, mask in masks.items()}
    figure = viz.groups_in_plane(parts, page.colours(), ungrouped="none")
chosen = page.chart(figure, "Map of the latents; a click opens one", "map", on_select="rerun", selection_mode="points")
for point in chosen.selection.points:
    latent = int(np.ravel(point["customdata"])[0])
    session.open_latent(latent, int(rows.loc[rows["latent"] == latent, "pole"].iloc[0]), run)
st.caption(f"{len(rows):,} of {index.d_sae:,} latents. {HELP}")

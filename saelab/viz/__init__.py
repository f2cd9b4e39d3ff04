"""Figures and HTML from plain arrays, for the app and the notebooks, in light and dark."""

from saelab.viz.attribution import attribution_graph, latent_name, node_name
from saelab.viz.charts import (
    activation_histogram,
    by_layer,
    density_histogram,
    dose_response,
    firing_rank,
    lines,
    logit_effects,
    logit_histogram,
    pareto,
    scatter,
)
from saelab.viz.escape import label, markdown, plain, visible
from saelab.viz.export import figure_page, latent_json, latent_page
from saelab.viz.legend import line_legend, looks
from saelab.viz.plane import groups_in_plane, values_in_plane
from saelab.viz.prompt import contest_bars, heatmap, steps
from saelab.viz.theme import DARK, LIGHT, Palette, contrast, palette
from saelab.viz.tokens import (
    PART,
    caption,
    counted,
    example_list,
    fact_table,
    outdated,
    style_sheet,
    text_block,
    token_chips,
    token_strip,
)

__all__ = [
    "DARK",
    "LIGHT",
    "PART",
    "Palette",
    "activation_histogram",
    "attribution_graph",
    "by_layer",
    "caption",
    "contest_bars",
    "contrast",
    "counted",
    "density_histogram",
    "dose_response",
    "example_list",
    "fact_table",
    "figure_page",
    "firing_rank",
    "groups_in_plane",
    "heatmap",
    "label",
    "latent_json",
    "latent_name",
    "latent_page",
    "line_legend",
    "lines",
    "logit_effects",
    "logit_histogram",
    "looks",
    "markdown",
    "node_name",
    "outdated",
    "palette",
    "pareto",
    "plain",
    "scatter",
    "steps",
    "style_sheet",
    "text_block",
    "token_chips",
    "token_strip",
    "values_in_plane",
    "visible",
]

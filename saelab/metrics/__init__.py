"""Metrics of SAEs. Each result states its formula, its sample and its interval."""

from __future__ import annotations

from saelab.metrics.density import FiringCounts, ZipfFit, lognormal_r2, zipf_fit
from saelab.metrics.dictionary import (
    babel,
    babel_co_selected,
    coherence_histogram,
    effective_rank,
    match_directions,
    max_cosines,
    shared_fraction,
    shared_rows,
    stability,
)
from saelab.metrics.intervals import Estimate, bootstrap, proportion, t_interval
from saelab.metrics.projections import decoder_projections, mean_cosine
from saelab.metrics.reconstruction import FORMULAS, LEGACY, ReconstructionSums
from saelab.metrics.recovery import (
    FeatureDetection,
    FeatureMatching,
    absorption_cosine,
    correlation_errors,
    correlations,
    feature_detection,
    match_dictionary,
    matched_correlation,
)

__all__ = [
    "FORMULAS",
    "LEGACY",
    "Estimate",
    "FeatureDetection",
    "FeatureMatching",
    "FiringCounts",
    "ReconstructionSums",
    "ZipfFit",
    "absorption_cosine",
    "babel",
    "babel_co_selected",
    "bootstrap",
    "coherence_histogram",
    "correlation_errors",
    "correlations",
    "decoder_projections",
    "effective_rank",
    "feature_detection",
    "lognormal_r2",
    "match_dictionary",
    "match_directions",
    "matched_correlation",
    "max_cosines",
    "mean_cosine",
    "proportion",
    "shared_fraction",
    "shared_rows",
    "stability",
    "t_interval",
    "zipf_fit",
]

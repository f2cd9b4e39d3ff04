"""Recovery of ground truth: whether a dictionary holds the planted directions, and whether its code fires with them.

A latent is matched to at most one planted feature. ``signed`` compares magnitudes, because a latent with two poles may
hold a direction with the opposite sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.devices import in_float64
from saelab.errors import UserError
from saelab.metrics.dictionary import match_directions
from saelab.sparse import SparseCode


@dataclass(frozen=True)
class FeatureMatching:
    """Planted feature ``features[i]`` is held by latent ``latents[i]`` with cosine ``cosines[i]``."""

    features: Int[Tensor, " m"]
    latents: Int[Tensor, " m"]
    cosines: Float[Tensor, " m"]

    @property
    def mean_cosine(self) -> float:
        """Mean magnitude of the matched cosines: 1 is exact recovery."""
        return float(self.cosines.abs().mean())


def match_dictionary(
    W_dec: Float[Tensor, "d_sae d_in"], truth: Float[Tensor, "m d_in"], signed: bool = False
) -> FeatureMatching:
    """The one-to-one matching with the largest sum of cosines between planted and learned directions."""
    alive = (W_dec.detach().norm(dim=1) > 0).nonzero().flatten()
    features, latents, cosines = match_directions(truth, W_dec[alive], signed)
    return FeatureMatching(features, alive[latents], cosines)


def correlations(code: SparseCode, truth: SparseCode) -> Float[Tensor, "m d_sae"]:
    """Pearson's correlation over tokens of every planted activation with every latent; 0 where one is constant."""
    a, b = in_float64(truth.dense()), in_float64(code.dense().detach())
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    scale = a.norm(dim=0)[:, None] * b.norm(dim=0)[None]
    return torch.where(scale > 0, (a.T @ b) / scale.where(scale > 0, 1.0), 0.0)


def matched_correlation(code: SparseCode, truth: SparseCode, signed: bool = False) -> float:
    """The mean matched Pearson correlation of activations (Hungarian matching).

    Planted features left without a latent, because there are fewer latents, count as 0. It is not the ``mcc`` of
    SAELens, which matches directions: that is :attr:`FeatureMatching.mean_cosine`.
    """
    from scipy.optimize import linear_sum_assignment

    r = correlations(code, truth)
    r = r.abs() if signed else r
    features, latents = linear_sum_assignment(r.numpy(), maximize=True)
    return float(r[features, latents].sum() / r.shape[0])


@dataclass(frozen=True)
class FeatureDetection:
    """How a latent's firing detects its planted feature, per feature; undefined ratios count as 0."""

    precision: Float[Tensor, " m"]
    recall: Float[Tensor, " m"]
    f1: Float[Tensor, " m"]


def feature_detection(code: SparseCode, truth: SparseCode, matching: FeatureMatching) -> FeatureDetection:
    """Precision, recall and F1 of ``code != 0`` for ``truth != 0`` over the matched pairs."""
    want = (truth.dense() != 0)[:, matching.features]
    have = (code.dense() != 0)[:, matching.latents]
    both = in_float64((want & have).sum(dim=0))
    n_have, n_want = (x.sum(dim=0).to(both.device) for x in (have, want))
    f1 = 2 * both / (n_have + n_want).clamp_min(1)
    return FeatureDetection(both / n_have.clamp_min(1), both / n_want.clamp_min(1), f1)


def absorption_cosine(
    W_dec: Float[Tensor, "d_sae d_in"],
    truth: Float[Tensor, "m d_in"],
    parents: Int[Tensor, " m"],
    matching: FeatureMatching,
) -> float:
    """Mean cosine between the learned directions of children and the true directions of their parents.

    ``parents[i]`` is the parent of planted feature i, -1 for roots. 0 when children were learned as planted in a tree
    whose levels are orthogonal; a latent that absorbed its parent scores up to 0.71 (Costa et al., 2025, table 1).
    """
    W, truth = (rows / rows.norm(dim=1, keepdim=True) for rows in (in_float64(W_dec.detach()), in_float64(truth)))
    is_child = parents[matching.features] >= 0
    if not is_child.any():
        raise UserError("absorption needs children among the matched features; the planted tree has none")
    learned = W[matching.latents[is_child]] * matching.cosines[is_child].sign()[:, None]
    return float((learned * truth[parents[matching.features[is_child]]]).sum(dim=1).mean())


def correlation_errors(
    W_dec: Float[Tensor, "d_sae d_in"],
    truth: Float[Tensor, "m d_in"],
    groups: Int[Tensor, " m"],
    levels: Int[Tensor, " m"],
    matching: FeatureMatching,
) -> tuple[float, float]:
    """Flat and hierarchical MSE of the matched dictionary's cosines against the planted ones.

    Flat: ``mean (D D^T - D* D*^T)_ij^2`` over pairs i != j of one group (siblings); hierarchical: the same over pairs
    of different levels. Directions at unit norm. The paper names both and prints no formula (Costa et al., 2025, figure
    4); the formula here is our interpretation.
    """
    order = matching.features.argsort()
    features = matching.features[order]
    W = in_float64(W_dec.detach())[matching.latents[order]] * matching.cosines[order].sign()[:, None]
    truth = in_float64(truth)[features]
    W, truth = W / W.norm(dim=1, keepdim=True), truth / truth.norm(dim=1, keepdim=True)
    error = (W @ W.T - truth @ truth.T).square()
    groups, levels = groups[features], levels[features]
    same = (groups[:, None] == groups) & ~torch.eye(features.numel(), dtype=torch.bool)
    across = levels[:, None] != levels
    return float(error[same].mean()), float(error[across].mean())

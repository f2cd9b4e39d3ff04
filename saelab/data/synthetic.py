"""Activations with known answers: planted dictionaries, and the hierarchical tree benchmark (Costa et al., 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import UserError
from saelab.sparse import SparseCode


class Planted:
    """Sparse sums of planted unit directions: ``x = sum_j a_j d_j + noise``.

    Directions are random, more of them than dimensions when ``n_features > d_in`` (superposition). Feature j is active
    with probability ``frequencies[j]``, which falls with rank as a power law and sums to ``l0``. Features ``2i`` and
    ``2i + 1`` fire together or apart: the first ``correlated`` pairs are coupled by a Gaussian copula of ``+coupling``,
    the ``anticorrelated`` pairs after them of ``-coupling``. An active feature has magnitude ``N(1, 0.25^2)``, clipped
    below at 0.1; the last ``signed`` features take either sign with equal probability.

    Attributes:
        directions: ``[n_features, d_in]``, unit rows.
        frequencies: ``[n_features]``.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        l0: float = 4.0,
        zipf: float = 0.5,
        correlated: int = 0,
        anticorrelated: int = 0,
        coupling: float = 0.9,
        signed: int = 0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        if 2 * (correlated + anticorrelated) > n_features or signed > n_features:
            raise UserError(
                f"n_features={n_features} is too few for the pairs and signed features asked for; plant more"
            )
        if not abs(coupling) < 1:
            raise UserError(f"coupling={coupling} must lie between -1 and 1")
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n_features, d_in, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        frequencies = torch.arange(1, n_features + 1, dtype=torch.float64) ** -zipf
        self.frequencies = frequencies * (l0 / frequencies.sum())
        if self.frequencies.max() >= 1:
            raise UserError(f"l0={l0} with zipf={zipf} needs a frequency above 1; lower one or plant more features")
        self.coupling = torch.zeros(n_features // 2, dtype=torch.float64)
        self.coupling[:correlated] = coupling
        self.coupling[correlated : correlated + anticorrelated] = -coupling
        self.n_signed, self.noise = signed, noise

    @property
    def n_features(self) -> int:
        return self.directions.shape[0]

    def sample(self, n: int, seed: int) -> tuple[Float[Tensor, "n d_in"], SparseCode]:
        """``n`` tokens and the code that made them."""
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(n, self.n_features, generator=generator, dtype=torch.float64)
        pairs = normal[:, : 2 * self.coupling.numel()].unflatten(1, (-1, 2))
        second = self.coupling * pairs[..., 0] + (1 - self.coupling.square()).sqrt() * pairs[..., 1]
        normal[:, 1 : 2 * self.coupling.numel() : 2] = second
        cut = math.sqrt(2) * torch.erfinv(2 * self.frequencies - 1)
        active = normal < cut
        magnitude = (1 + 0.25 * torch.randn(n, self.n_features, generator=generator)).clamp_min(0.1)
        if self.n_signed:
            coins = torch.rand(n, self.n_signed, generator=generator) < 0.5
            magnitude[:, -self.n_signed :] *= torch.where(coins, 1.0, -1.0)
        acts = magnitude * active
        x = acts @ self.directions
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator)
        return x, SparseCode.from_dense(acts)


# The tree: 11 mutually exclusive parents, of which 0, 4 and 8 have three children each, and leaves 12 .. 19.
PARENT_PROBABILITY = {0: 0.2, 4: 0.2, 8: 0.2, **dict.fromkeys(range(12, 20), 0.05)}
CHILDREN = {0: (1, 2, 3), 4: (5, 6, 7), 8: (9, 10, 11)}
CHILD_PROBABILITY = 0.2  # of each child; none with the rest, 0.4
N_NODES = 20


@dataclass(frozen=True)
class Magnitudes:
    """Mean and standard deviation of the activations of parents and of children.

    ``positive`` sets the negative ones to zero: the paper says that activations are kept positive, and its code does
    not; it matters where the mean is not several deviations above zero.
    """

    parent_mean: float = 1.5
    parent_sd: float = 0.25
    child_mean: float = 1.5
    child_sd: float = 0.25
    positive: bool = False


class Tree:
    """The hierarchical benchmark of Costa et al. (2025, arXiv 2506.03093): 20 features in 20 dimensions on two levels.

    One parent per sample; an internal parent adds one of its three children or none. Parents have pairwise cosine
    ``correlation``, so have the children of one parent; different groups are exactly orthogonal, so levels are
    conditionally orthogonal. Expected L0: 1 + 0.6 * 0.6 = 1.36.

    Attributes:
        directions: ``[20, 20]``, unit rows.
        parents: parent of each node, -1 for the roots, ``[20]``.
        groups: 0 for parents, 1 .. 3 for the sets of siblings, ``[20]``.
        levels: 0 for parents, 1 for children, ``[20]``.
    """

    def __init__(self, correlation: float = 0.0, magnitudes: Magnitudes | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        orthonormal = torch.linalg.qr(torch.randn(N_NODES, N_NODES, generator=generator, dtype=torch.float64)).Q
        self.magnitudes = magnitudes or Magnitudes()
        self.parents = torch.full((N_NODES,), -1)
        self.groups = torch.zeros(N_NODES, dtype=torch.int64)
        for group, (parent, children) in enumerate(CHILDREN.items(), start=1):
            self.parents[list(children)] = parent
            self.groups[list(children)] = group
        self.levels: Int[Tensor, " nodes"] = (self.parents >= 0).long()
        directions = orthonormal.clone()
        for group in self.groups.unique().tolist():
            members = (self.groups == group).nonzero().flatten()
            directions[members] = correlate(orthonormal[members], correlation)
        self.directions = directions.float()

    def sample(self, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "n 20"], Float[Tensor, "n 20"]]:
        """``n`` samples and their activations."""
        roots = torch.tensor(list(PARENT_PROBABILITY))
        chosen = torch.multinomial(
            torch.tensor(list(PARENT_PROBABILITY.values())), n, replacement=True, generator=generator
        )
        parent = roots[chosen]
        # Outcome 3 is "no child"; leaves ignore the draw.
        outcome = torch.multinomial(
            torch.tensor([CHILD_PROBABILITY] * 3 + [1 - 3 * CHILD_PROBABILITY]),
            n,
            replacement=True,
            generator=generator,
        )
        has_child = (outcome < 3) & torch.isin(parent, torch.tensor(list(CHILDREN)))
        m = self.magnitudes
        a_parent = m.parent_mean + m.parent_sd * torch.randn(n, generator=generator)
        a_child = m.child_mean + m.child_sd * torch.randn(n, generator=generator)
        if m.positive:
            a_parent, a_child = a_parent.clamp_min(0), a_child.clamp_min(0)
        acts = torch.zeros(n, N_NODES)
        acts[torch.arange(n), parent] = a_parent
        rows = has_child.nonzero().flatten()
        # The children of node p are p + 1, p + 2, p + 3.
        acts[rows, parent[rows] + 1 + outcome[rows]] = a_child[rows]
        return acts @ self.directions, acts


def mixing(correlation: float, n: int) -> float:
    """The share epsilon of the published construction that gives ``n`` vectors the pairwise cosine ``correlation``.

    ``q_i <- (1 - eps) q_i + eps / (n - 1) * sum_{j != i} q_j`` for orthonormal q, then renormalised.
    """
    from scipy.optimize import brentq

    if not 0 <= correlation < 1:
        raise UserError(f"correlation={correlation} must lie in 0 .. 1, 1 excluded")

    def cosine(eps: float) -> float:
        a = eps / (n - 1)
        return (2 * (1 - eps) * a + (n - 2) * a * a) / ((1 - eps) ** 2 + (n - 1) * a * a)

    # At eps = (n - 1) / n all vectors coincide; the cosine rises all the way there.
    return float(brentq(lambda eps: cosine(eps) - correlation, 0.0, (n - 1) / n, xtol=1e-12))  # pyright: ignore


def correlate(q: Float[Tensor, "m d"], correlation: float) -> Float[Tensor, "m d"]:
    """Orthonormal rows mixed until each two have cosine ``correlation``, at unit norm."""
    n = q.shape[0]
    eps = mixing(correlation, n)
    mixed = (1 - eps) * q + eps / (n - 1) * (q.sum(dim=0) - q)
    return mixed / mixed.norm(dim=1, keepdim=True)

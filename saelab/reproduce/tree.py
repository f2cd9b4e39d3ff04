"""Matching pursuit and other SAEs on the hierarchical tree benchmark (Costa et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from saelab.data.synthetic import Magnitudes, Tree
from saelab.metrics import absorption_cosine, correlation_errors, match_dictionary
from saelab.reproduce.toys import Kind, Toys, train_toys

N_TEST = 5000
RECOVERED = 0.9  # matched cosine from which a child counts as found; one that absorbed its parent has about 0.7


@dataclass(frozen=True)
class TreeScore:
    """What one replica learned: recovery of the planted directions, and its errors on fresh samples."""

    mean_cosine: float
    absorption: float
    children_recovered: float
    flat_mse: float
    hierarchical_mse: float
    fvu: float
    l0: float

    def content(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def score(W_dec: Tensor, recon: Tensor, l0: float, x: Tensor, tree: Tree) -> TreeScore:
    """Compare a dictionary and its reconstruction of fresh samples with the tree."""
    matching = match_dictionary(W_dec, tree.directions)
    flat, across = correlation_errors(W_dec, tree.directions, tree.groups, tree.levels, matching)
    fvu = float((x - recon).double().square().sum() / (x - x.mean(0)).double().square().sum())
    absorbed = absorption_cosine(W_dec, tree.directions, tree.parents, matching)
    found = matching.cosines[tree.parents[matching.features] >= 0].abs() >= RECOVERED
    return TreeScore(matching.mean_cosine, absorbed, float(found.double().mean()), flat, across, fvu, l0)


def run_toys(kind: Kind, trees: Sequence[Tree], seeds: Sequence[int], steps: int) -> list[TreeScore]:
    """Train one kind on all trees at once, and score each replica."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample(n: int) -> Tensor:
        return torch.stack([tree.sample(n, g)[0] for tree, g in zip(trees, generators)])

    toys = Toys(kind, seeds)
    train_toys(toys, sample, steps)
    tests = [tree.sample(N_TEST, torch.Generator().manual_seed(10_000 + s))[0] for tree, s in zip(trees, seeds)]
    z = toys.codes(torch.stack(tests))
    recon = (z @ toys.W_dec + toys.b_dec).detach()
    l0 = (z != 0).sum(2).double().mean(1).tolist()
    return [score(toys.W_dec[i], recon[i], l0[i], tests[i], tree) for i, tree in enumerate(trees)]


def child_magnitudes(mean: float, sd: float = 0.25) -> Magnitudes:
    """The setting of the absorption table: parents N(1, 0.25^2), children N(mean, sd^2), none negative."""
    return Magnitudes(parent_mean=1.0, parent_sd=0.25, child_mean=mean, child_sd=sd, positive=True)

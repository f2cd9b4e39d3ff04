"""The points that the learning-rate grid measures: batch size, width, steps and k for each variant and cache.

The full product would be thousands of points. Instead, a scrambled Sobol sequence per cache and variant covers the
logarithms of the four numbers evenly. Points are sorted into tiers by their expected cost and handed out in a fixed
pattern of tiers, variants and caches, so that any prefix of the sample contains cheap and expensive ones: the cheap
ones alone have small batches, few latents and few steps all at once, and do not tell the three apart.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import qmc

BATCHES = (512, 8192)  # tokens per step; powers of two between these
WIDTHS = (768, 16_384)  # latents; multiples of 128
STEPS = (100, 5000)
KS = (8, 128)  # latents per token

# How often each variant is drawn, relative to the others.
WEIGHTS = {
    "topk": 3.0,
    "abs_topk": 3.0,
    "batch_topk": 3.0,
    "matching_pursuit": 3.0,
    "matryoshka": 1.0,
    "mutual_choice": 1.0,
    "feature_choice": 1.0,
    "relu": 1.0,
    "jump_relu": 1.0,
    "gated": 1.0,
}
GRADIENTS = {"gradient_topk": 1.0}  # for caches that hold gradients
PENALTY = ("relu", "jump_relu", "gated")

# Expected seconds of one core per token, latent and input dimension, measured; pursuit's grows with k.
SECONDS = {
    "matching_pursuit": 150e-12,
    "matryoshka": 120e-12,
    "relu": 400e-12,
    "jump_relu": 400e-12,
    "gated": 900e-12,
}
SECONDS_ELSE, SECONDS_PER_K, SECONDS_PER_STEP, D_IN_EXTRA = 80e-12, 2.7e-12, 4e-3, 64
TIERS = (3.0, 7.0, 18.0, 80.0)  # seconds expected of one SAE, at most
PATTERN = (1, 0, 2, 1, 0, 1, 0, 2)  # tiers in the order of turns
PATTERN_LATER, TURNS_WITHOUT_LAST = (1, 2, 0, 3, 1, 2, 1, 3), 24
GOLDEN = (math.sqrt(5) - 1) / 2
CANDIDATES = 4096  # points of a sequence, of which those beyond the last tier are dropped


@dataclass(frozen=True)
class Point:
    """One combination, for which the best learning rate is sought. Counts are in tokens, latents and steps."""

    cache: str
    variant: str
    batch_size: int
    d_sae: int
    n_steps: int
    k: int
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # of the variant, beside its sparsity
    train: dict[str, Any] = field(default_factory=dict)  # of the trainer
    scale: float = 1.0  # factor on the power of two by which the trainer multiplies the activations

    @property
    def key(self) -> str:
        """A name that says everything about the point."""
        extra = "".join(f"-{name}={value}" for name, value in sorted({**self.options, **self.train}.items()))
        numbers = f"b{self.batch_size}-w{self.d_sae}-t{self.n_steps}-k{self.k}-seed{self.seed}"
        scale = "" if self.scale == 1 else f"-scale={self.scale:g}"
        return f"{self.cache}-{self.variant}-{numbers}{extra}{scale}"

    def row(self) -> dict[str, Any]:
        """The point as a part of a JSON line."""
        row = {"key": self.key, **asdict(self)}
        return row if self.scale != 1 else {name: value for name, value in row.items() if name != "scale"}


def sparsity(variant: str, k: int) -> dict[str, Any]:
    """The option that makes a variant as sparse as ``k`` latents per token."""
    return {"n_steps": k} if variant == "matching_pursuit" else {"l0": k} if variant in PENALTY else {"k": k}


def seconds(point: Point, d_in: int) -> float:
    """Rough time of one training run on one core."""
    per_product = SECONDS.get(point.variant, SECONDS_ELSE)
    if point.variant == "matching_pursuit":
        per_product += SECONDS_PER_K * point.k
    products = point.n_steps * point.batch_size * point.d_sae * (d_in + D_IN_EXTRA)
    return per_product * products + SECONDS_PER_STEP * point.n_steps


def _between(low: float, high: float, u: float) -> float:
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))


def candidates(cache: str, d_in: int, variant: str, seed: int) -> tuple[list[Point], ...]:
    """The points of one variant on one cache in the order of their sequence, one list per tier."""
    # The argument `rng`, which newer versions of scipy prefer, gives another sequence for the same number.
    sampler = qmc.Sobol(4, seed=zlib.crc32(f"{cache} {variant} {seed}".encode()))  # pyright: ignore[reportCallIssue]
    tiers: tuple[list[Point], ...] = tuple([] for _ in TIERS)
    for u in sampler.random(CANDIDATES):
        batch = 2 ** round(math.log2(_between(*BATCHES, u[0])))
        width = 128 * round(_between(*WIDTHS, u[1]) / 128)
        steps, k = round(_between(*STEPS, u[2])), round(_between(*KS, u[3]))
        point = Point(cache, variant, batch, width, steps, k, seed)
        cost = seconds(point, d_in)
        tier = next((i for i, most in enumerate(TIERS) if cost <= most), None)
        if tier is not None:
            tiers[tier].append(point)
    return tiers


def _choose(weights: dict[str, float], turn: int, place: int) -> str:
    """A variant for a cache's turn, by a sequence that is balanced over turns and over caches."""
    u = (turn * GOLDEN + place * GOLDEN**2 / 2) % 1.0
    edges = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(edges / edges[-1], u, side="right"))]


def design(caches: Sequence[tuple[str, int, bool]], seed: int) -> Iterator[Point]:
    """Points in the order to measure them, taking the caches in turn.

    ``caches`` are names, widths and whether there are gradients; a cache with gradients gets the variants that need
    them alone, and a turn in every fourth round.
    """
    queues: dict[tuple[str, str], list[Iterator[Point]]] = {}
    for turn in range(CANDIDATES):
        for place, (name, d_in, grads) in enumerate(caches):
            if grads and turn % 4:
                continue
            variant = _choose(GRADIENTS if grads else WEIGHTS, turn, place)
            if (name, variant) not in queues:
                queues[name, variant] = [iter(tier) for tier in candidates(name, d_in, variant, seed)]
            pattern = PATTERN if turn < TURNS_WITHOUT_LAST else PATTERN_LATER
            tier = pattern[(turn + 3 * place) % len(pattern)]
            # A variant without points in this tier takes its cheapest ones from the next.
            chain = itertools.chain.from_iterable(queues[name, variant][tier:])
            point = next(chain, None)
            if point is not None:
                yield point

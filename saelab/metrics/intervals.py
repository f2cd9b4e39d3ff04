"""Numbers that carry their formula, their sample and their interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95  # of every interval in a report


@dataclass(frozen=True)
class Estimate:
    """One reported number: ``value`` in ``low .. high`` (95 %), measured on ``n`` ``unit``s by ``formula``.

    ``low`` and ``high`` are None where no interval is defined; ``interval`` then says why.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    formula: str
    interval: str

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{self.formula}: a report holds finite numbers only, got {number}")

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def cluster_weights(n_clusters: int, n_resamples: int = 1000, seed: int = 0) -> Array:
    """How often each cluster is drawn in each resample of the bootstrap, ``[n_resamples + 1, n_clusters]``.

    The first row is all ones: the sample itself.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_resamples)
    return np.concatenate([np.ones((1, n_clusters)), drawn.astype(np.float64)])


def from_resamples(values: Array, n: int, unit: str, formula: str, n_clusters: int, cluster: str) -> Estimate:
    """The estimate of ``values[0]`` with the percentile interval of ``values[1:]``.

    Resamples in which the ratio is undefined (no spread left, say) are left out; fewer than two clusters, or less
    than half of the resamples defined, give no interval.
    """
    finite = values[1:][np.isfinite(values[1:])]
    if n_clusters < 2 or finite.size < 0.5 * (values.size - 1):
        why = f"none: {n_clusters} {cluster}s are too few to resample"
        return Estimate(float(values[0]), None, None, n, unit, formula, why)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    how = f"95 % percentile bootstrap over {n_clusters} {cluster}s"
    return Estimate(float(values[0]), float(low), float(high), n, unit, formula, how)


def proportion(count: int, n: int, unit: str, formula: str) -> Estimate:
    """A share of ``n`` with Wilson's interval (Wilson, 1927)."""
    z = 1.959963984540054
    share, spread = count / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(share, low, high, n, unit, formula, f"95 % Wilson interval over {n} {unit}s")


def bootstrap(
    sample: Array, statistic: Callable[[Array], float], n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of ``statistic`` of a one-dimensional sample."""
    rng = np.random.default_rng(seed)
    drawn = sample[rng.integers(sample.size, size=(n_resamples, sample.size))]
    low, high = np.quantile([statistic(row) for row in drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def t_interval(sample: Array) -> tuple[float, float]:
    """Student's 95 % interval of the mean, for the handful of seeds of a comparison (at least two)."""
    from scipy import stats

    if sample.size < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    half = float(stats.t.ppf((1 + LEVEL) / 2, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size))
    return float(sample.mean()) - half, float(sample.mean()) + half

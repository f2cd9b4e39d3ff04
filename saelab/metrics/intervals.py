"""Numbers that carry their formula, their sample and their interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95  # of every interval in a report
RESAMPLES = 1000
FEW = 10  # documents below which a percentile bootstrap covers clearly less than it says
HELD = 1 << 24  # drawn multiplicities held at once: 128 MiB of them, twice


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


def resampled_sums(*columns: Array, seed: int = 0) -> list[Array]:
    """Sums of each column over the documents of the sample itself, and of each of 1,000 resamples of the bootstrap.

    A column ``[n_documents, ...]`` gives ``[1001, ...]``. The draws are held for a few resamples at a time, since a
    cache may have millions of them.
    """
    n, rng = len(columns[0]), np.random.default_rng(seed)
    parts = [[np.ones((1, n)) @ column] for column in columns]
    for start in range(0, RESAMPLES, step := max(HELD // n, 1)):
        size = min(step, RESAMPLES - start)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        for part, column in zip(parts, columns):
            part.append(drawn @ column)
    return [np.concatenate(part) for part in parts]


def from_resamples(
    values: Array, n: int, unit: str, formula: str, n_resampled: int, over: str = "documents"
) -> Estimate:
    """The estimate of ``values[0]`` with the percentile interval of ``values[1:]``, ``n_resampled`` ``over`` resampled.

    Resamples in which the ratio is undefined (no spread left, say) are left out; fewer than two documents, or less
    than half of the resamples defined, give no interval.
    """
    finite = values[1:][np.isfinite(values[1:])]
    if n_resampled < 2 or finite.size < 0.5 * (values.size - 1):
        one = f"{over.removesuffix('s')} is" if n_resampled == 1 else f"{over} are"
        why = f"none: cannot say, {n_resampled} {one} too few to resample"
        return Estimate(float(values[0]), None, None, n, unit, formula, why)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    how = f"95 % percentile bootstrap over {n_resampled} {over}"
    if n_resampled < FEW:
        how += ", which are too few for it: the interval is too narrow"
    return Estimate(float(values[0]), float(low), float(high), n, unit, formula, how)


def proportion(count: int, n: int, unit: str, formula: str) -> Estimate:
    """A share of ``n`` with Wilson's interval (Wilson, 1927)."""
    from scipy.special import ndtri  # scipy.stats has the interval too, and takes half a second to import

    p, z = count / n, float(ndtri((1 + LEVEL) / 2))
    middle, half = 2 * n * p + z**2, z * math.sqrt(4 * n * p * (1 - p) + z**2)
    low, high = ((middle + side) / (2 * (n + z**2)) for side in (-half, half))
    how = f"95 % Wilson interval over {n} {unit}s"
    return Estimate(p, low if count else 0.0, high if count < n else 1.0, n, unit, formula, how)


def bootstrap(sample: Array, statistic: Callable[[Array], float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of ``statistic`` of a one-dimensional sample, of one number or more."""
    # scipy.stats.bootstrap is no shorter, refuses a sample of one, and names its seed differently from 1.15 on.
    rng = np.random.default_rng(seed)
    drawn = sample[rng.integers(sample.size, size=(RESAMPLES, sample.size))]
    low, high = np.quantile([statistic(row) for row in drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def two_way(
    errors: Float[Array, "seeds documents"], deviations: Float[Array, " documents"], seed: int = 0
) -> tuple[float, float | None, float | None]:
    """Mean over seeds of ``sum(errors) / sum(deviations)`` and its 95 % interval over seeds and documents.

    ``errors`` are sums of each document, of an SAE per seed or of the differences of pairs. Half of the interval is
    ``sqrt(a^2 + b^2)``: ``a`` is half of Student's interval over the seeds, ``b`` 1.96 standard deviations of the mean
    over resampled documents. One seed or one document gives no interval.
    """
    shares = errors.sum(1) / deviations.sum()
    mean = float(shares.mean())
    if errors.shape[0] < 2 or errors.shape[1] < 2:
        return mean, None, None
    low, high = t_interval(shares)
    top, bottom = resampled_sums(errors.mean(0), deviations, seed=seed)
    spread = 1.96 * float((top[1:] / bottom[1:]).std(ddof=1))
    half = math.hypot((high - low) / 2, spread)
    return mean, mean - half, mean + half


def t_interval(sample: Array) -> tuple[float, float]:
    """Student's 95 % interval of the mean, for the handful of seeds of a comparison (at least two)."""
    from scipy.special import stdtrit

    if sample.size < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    half = float(stdtrit(sample.size - 1, (1 + LEVEL) / 2) * sample.std(ddof=1) / math.sqrt(sample.size))
    return float(sample.mean()) - half, float(sample.mean()) + half

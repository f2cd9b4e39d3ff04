"""Rules for the learning rate, fitted to a grid of measurements, and what following them costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize

from saelab.bench.learning_rate.design import sparsity
from saelab.sae import build
from saelab.training.rate import automatic, published

AXES = {"batch_size": 2048, "d_sae": 4096, "n_steps": 500, "k": 32}  # and where the logarithms are zero
PRIOR = np.array([math.log(2e-3), 0.0, -0.3, -0.3, 0.0])  # before anything is measured
PRIOR_WEIGHT = 3.0  # in points


def features(row: Mapping[str, Any]) -> np.ndarray:
    """One, and the natural logarithms of batch, width, steps and k."""
    return np.array([1.0, *(math.log(row[name] / unit) for name, unit in AXES.items())])


Curve = tuple[Mapping[str, Any], np.ndarray, np.ndarray]


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """For each point with a bracketed optimum: its row, the rates' logarithms in order, and the losses' logarithms.

    An optimum is bracketed if a lower and a higher rate were tried too. A diverged run counts as a loss of 1, that of
    predicting the mean.
    """
    found: dict[str, dict[float, float]] = {}
    rows: dict[str, Mapping[str, Any]] = {}
    for row in records:
        loss = 1.0 if row["loss"] is None else row["loss"]
        found.setdefault(row["key"], {})[math.log(row["lr"])] = math.log(loss)
        rows[row["key"]] = row
    out = {}
    for key, losses in found.items():
        x = np.array(sorted(losses))
        y = np.array([losses[value] for value in x])
        if 0 < y.argmin() < len(y) - 1:
            out[key] = (rows[key], x, y)
    return out


def optimum(x: np.ndarray, y: np.ndarray) -> float:
    """Logarithm of the best rate: the vertex of the parabola through the lowest loss and its neighbours."""
    i = int(y.argmin())
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    return float(x[i] - b / (2 * a))


def guess(records: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float:
    """Where to begin the search for a point: a fit to the optima so far, held near the prior while they are few."""
    rows = curves(records)
    weight = np.sqrt(PRIOR_WEIGHT) * np.eye(len(PRIOR))
    design = [*weight, *(features(r) for r, _, _ in rows.values())]
    wanted = [*(weight @ PRIOR), *(optimum(x, y) for _, x, y in rows.values())]
    solution = np.linalg.lstsq(np.array(design), np.array(wanted), rcond=None)[0]
    own = [optimum(x, y) - features(r) @ solution for r, x, y in rows.values() if r["variant"] == row["variant"]]
    return math.exp(float(features(row) @ solution) + sum(own) / (len(own) + 1))


# Which logarithms a rule looks at, from the simplest on.
RULES: dict[str, tuple[str, ...]] = {
    "one rate": (),
    "width": ("d_sae",),
    "steps": ("n_steps",),
    "steps, width": ("n_steps", "d_sae"),
    "batch, width": ("batch_size", "d_sae"),
    "batch, steps": ("batch_size", "n_steps"),
    "batch, steps, width": ("batch_size", "n_steps", "d_sae"),
    "batch, steps, width, k": ("batch_size", "n_steps", "d_sae", "k"),
}


@dataclass(frozen=True)
class Rule:
    """``log lr = constant + sum_a exponent_a log(a / unit_a) + offset of the variant``."""

    terms: tuple[str, ...]
    constant: float
    exponents: tuple[float, ...]
    offsets: dict[str, float]  # by variant; missing ones count as 0

    def __call__(self, row: Mapping[str, Any]) -> float:
        """The rate's logarithm for a point."""
        powers = sum(b * math.log(row[name] / AXES[name]) for name, b in zip(self.terms, self.exponents))
        return self.constant + powers + self.offsets.get(row["variant"], 0.0)

    def __str__(self) -> str:
        powers = "".join(f" * ({name}/{AXES[name]})^{b:+.2f}" for name, b in zip(self.terms, self.exponents))
        factors = ", ".join(f"{variant} {math.exp(o):.2f}" for variant, o in self.offsets.items())
        return f"lr = {math.exp(self.constant):.2e}{powers}" + (f"  times  {factors}" if factors else "")


GRID = np.linspace(math.log(1e-5), 0.0, 600)  # logarithms of rates
LEAST = 8  # points to fit rules to
CAP = 0.5  # regrets beyond count as this
HOLD = 1.0  # how firmly exponents and offsets are held near zero
HEAD = f"{'regret':38s} {'n':>4s} {'mean':>7s} {'median':>7s} {'max':>7s} {'<=2%':>7s}"
PLANTED = "planted"  # beginning of the names of caches without a language model


def regret(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Loss at rates' logarithms above the best loss that was measured, as a share of it: 0.02 is two per cent more.

    Between measured rates it is read from a monotone cubic (a parabola dips below the best where one side is steep);
    beyond them from the line through the outermost two, which errs on the low side, as losses are convex there.
    """
    value = PchipInterpolator(x, y)(np.clip(at, x[0], x[-1]))
    low, high = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
    value += np.minimum(at - x[0], 0) * low + np.maximum(at - x[-1], 0) * high
    return np.expm1(np.clip(value - y.min(), 0.0, math.log(10)))


def tabulate(points: Sequence[Curve]) -> np.ndarray:
    """Regret of each point at every rate of ``GRID``, ``[points, rates]``; no more than ``CAP``."""
    return np.array([np.minimum(regret(x, y, GRID), CAP) for _, x, y in points])


def design_of(points: Sequence[Curve], terms: Sequence[str], variants: Sequence[str]) -> np.ndarray:
    """One row per point: 1, the terms' logarithms, a mark for its variant."""
    return np.array(
        [
            [
                1.0,
                *(math.log(row[name] / AXES[name]) for name in terms),
                *(float(row["variant"] == v) for v in variants),
            ]
            for row, _, _ in points
        ]
    )


def fit(points: Sequence[Curve], terms: Sequence[str], offsets: bool, table: np.ndarray | None = None) -> Rule:
    """The rule with the least mean regret over the points.

    Losses rise steeply above the best rate and gently below it, so this is lower than a fit to the best rates, from
    which the search starts. Exponents and offsets are held near zero: what the points do not tell apart stays small.
    """
    table = tabulate(points) if table is None else table
    variants = sorted({row["variant"] for row, _, _ in points}) if offsets else []
    matrix = design_of(points, terms, variants)
    held = HOLD * np.eye(matrix.shape[1])[1:]
    wanted = np.array([optimum(x, y) for _, x, y in points])
    first = np.linalg.lstsq(np.vstack([matrix, held]), np.append(wanted, np.zeros(len(held))), rcond=None)[0]

    def cost(coefficients: np.ndarray) -> float:
        place = (matrix @ coefficients - GRID[0]) / (GRID[1] - GRID[0])
        low = np.clip(place.astype(int), 0, len(GRID) - 2)
        share = np.clip(place - low, 0, 1)
        rows = np.arange(len(low))
        found = (1 - share) * table[rows, low] + share * table[rows, low + 1]
        return float(found.mean() + 0.01 * np.square(held @ coefficients).sum() / len(low))

    # A simplex alone may stop early in many dimensions; it is started again where it stopped.
    for _ in range(3):
        first = minimize(cost, first, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-4, "fatol": 1e-7}).x
    constant, *rest = first.tolist()
    return Rule(tuple(terms), constant, tuple(rest[: len(terms)]), dict(zip(variants, rest[len(terms) :])))


def default(row: Mapping[str, Any]) -> float:
    """The logarithm of the trainer's rate, ``--lr auto``."""
    options = {**sparsity(row["variant"], row["k"]), **row["options"]}
    sae = build(row["variant"], 1, row["d_sae"], **options)  # for its factor, which may depend on the options
    numbers = {name: row[name] for name in ("d_sae", "n_steps", "batch_size", "d_in", "k")}
    return math.log(automatic(**numbers, factor=sae.rate_factor).value)


FIXED: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "published: 2e-4 / sqrt(d_sae / 2^14)": lambda row: math.log(published(row["d_sae"])),
    "one rate: 6.4e-3": lambda row: math.log(6.4e-3),
    "--lr auto": default,
}


def costs(points: Sequence[Curve], rule: Callable[[Mapping[str, Any]], float]) -> list[float]:
    """The regret of a rule at each point."""
    return [float(regret(x, y, np.array(rule(row)))) for row, x, y in points]


def left_out(points: Sequence[Curve], terms: Sequence[str], offsets: bool) -> list[float]:
    """The regret at each point of the rule fitted to all others."""
    out, table = [], tabulate(points)
    for i, (row, x, y) in enumerate(points):
        rule = fit([*points[:i], *points[i + 1 :]], terms, offsets, np.delete(table, i, axis=0))
        out.append(float(regret(x, y, np.array(rule(row)))))
    return out


def summary(name: str, values: Sequence[float]) -> str:
    """One line of a table: how many, mean, median, largest, and the share within two per cent."""
    v = np.array(values)
    numbers = f"{v.mean():7.2%} {np.median(v):7.2%} {v.max():7.2%} {np.mean(v <= 0.02):7.0%}"
    return f"{name:38s} {len(v):4d} {numbers}"


def report(records: Sequence[Mapping[str, Any]], caches: Sequence[str] = ()) -> str:
    """Tables: the best rate of each point, the regret of the fixed rules, and the rules that fit best.

    Rules are fitted to the activations of language models; the planted world only shows what they cost there.
    ``caches`` are beginnings of the names of the caches to use; all without.
    """
    records = [row for row in records if row["cache"].startswith(tuple(caches) or "")]
    plain = [row for row in records if row.get("scale", 1.0) == 1.0]
    points = list(curves(plain).values())
    real = [point for point in points if not point[0]["cache"].startswith(PLANTED)]
    worlds = [point for point in points if point[0]["cache"].startswith(PLANTED)]
    lines = [f"{len(records)} SAEs, {len(points)} points with a bracketed optimum"]
    lines += [
        "",
        f"{'best rate, and the lowest loss measured':70s} {'rate':>8s} {'loss':>7s}  --lr auto, regret",
    ]
    for (row, x, y), cost in zip(points, costs(points, default)):
        rate = optimum(x, y)
        ratio = math.exp(default(row) - rate)
        lines.append(f"{row['key']:70s} {math.exp(rate):.2e} {math.exp(y.min()):7.4f} {ratio:11.2f} times {cost:8.2%}")
    for title, group in (("language models", real), ("planted world", worlds)):
        if group:
            lines += ["", title, HEAD, *(summary(name, costs(group, rule)) for name, rule in FIXED.items())]
            lines += parts("auto", group, costs(group, default))
    lines += scales(records)
    if len(real) < LEAST:
        return "\n".join([*lines, "", f"{len(real)} points on language models; {LEAST} are the least to fit rules"])
    lines += ["", "fitted to the language models", HEAD]
    for name, terms in RULES.items():
        for offsets in (False, True):
            lines += ["", *describe(real, name, terms, offsets)]
    return "\n".join(lines)


def parts(name: str, points: Sequence[Curve], values: Sequence[float]) -> list[str]:
    """The lines of a table for each variant and each cache."""
    lines = []
    for kind in ("variant", "cache"):
        for value in sorted({row[kind] for row, _, _ in points}):
            chosen = [v for v, (row, _, _) in zip(values, points) if row[kind] == value]
            lines.append(summary(f"  {name}, {value}", chosen))
    return lines


def scales(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best rate and lowest loss of points that were measured with the activations multiplied by several factors."""
    groups: dict[str, list[Curve]] = {}
    for key, curve in curves(records).items():
        groups.setdefault(key.split("-scale=")[0], []).append(curve)
    lines = []
    for key, group in groups.items():
        if len(group) > 1:
            for row, x, y in sorted(group, key=lambda curve: curve[0].get("scale", 1.0)):
                rate = math.exp(optimum(x, y))
                lines.append(f"{key:62s} {row.get('scale', 1.0):7.4g} {rate:.2e} {math.exp(y.min()):7.4f}")
    return ["", f"{'scale of the activations':62s} {'factor':>7s} {'rate':>8s} {'loss':>7s}", *lines] if lines else []


def describe(points: Sequence[Curve], name: str, terms: Sequence[str], offsets: bool) -> list[str]:
    """A rule and its regret at the points it was fitted to, at points left out, and by variant and cache."""
    rule = fit(points, terms, offsets)
    own = costs(points, rule)
    label = f"{name}{' + variant' if offsets else ''}"
    lines = [f"{label}: {rule}", summary("  fitted", own), summary("  left out", left_out(points, terms, offsets))]
    return lines + (parts("fitted", points, own) if len(terms) >= 2 else [])

"""Differences between the SAEs of two curves, budget by budget, with intervals over seeds and documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from saelab.metrics.intervals import Array, two_way
from saelab.reproduce.lab import Record
from saelab.reproduce.ledger import Verdict, above, all_of, below, summary
from saelab.sae.controller import NEAR

Side = Literal["below", "above"]
# What each document contributes to the numerator and to the denominator of a metric.
PARTS = {
    "fvu": (("squared_error",), ("squared_deviation",)),
    "ce_loss_recovered_zero": (("ce_zero", "ce_sae"), ("ce_zero", "ce_clean")),
    "kl_div_with_sae": (("kl_sae",), ("n",)),
}


def by_budget(records: Sequence[Record], a: str, b: str, metric: str) -> dict[str, dict[str, Any]]:
    """``metric`` of curve ``a`` minus that of curve ``b`` at each budget that both have, seed by seed.

    A metric of ``PARTS`` gets an interval over seeds and held-out documents, others one over seeds. ``l0`` holds the
    measured L0 of both, ``l0_apart`` those of the seed in which they differ most; where that is by more than 5 %,
    ``verdict`` is not to be drawn and ``low`` and ``high`` are None.
    """
    found = {}
    for budget in sorted({r.spec.budget for r in records if r.spec.label == a}):
        pairs = _pairs(records, a, b, budget)
        if pairs:
            found[str(budget)] = _difference(pairs, metric)
    return found


def verdicts(curve: dict[str, dict[str, Any]], side: Side) -> dict[str, Verdict]:
    """The verdict at each budget."""
    judge = below if side == "below" else above
    return {budget: judge(difference) for budget, difference in curve.items()}


def verdict(curve: dict[str, dict[str, Any]], side: Side, at: int | None = None) -> Verdict:
    """The verdict at the budget nearest to ``at``, or the one that all budgets agree on."""
    found = verdicts(curve, side)
    if not found:
        return "not testable here"
    if at is None:
        return all_of([*found.values()])
    return found[min(found, key=lambda budget: abs(int(budget) - at))]


def _pairs(records: Sequence[Record], a: str, b: str, budget: int) -> list[tuple[Record, Record]]:
    sides = [{r.spec.seed: r for r in records if r.spec.label == label and r.spec.budget == budget} for label in (a, b)]
    return [(sides[0][seed], sides[1][seed]) for seed in sorted(sides[0].keys() & sides[1].keys())]


def _difference(pairs: Sequence[tuple[Record, Record]], metric: str) -> dict[str, Any]:
    values = [left.metrics[metric] - right.metrics[metric] for left, right in pairs]
    if metric in PARTS and all(PARTS[metric][0][0] in record.by_document for pair in pairs for record in pair):
        parts = [[_parts(record, metric) for record in pair] for pair in pairs]
        errors = np.stack([left[0] - right[0] for left, right in parts])
        mean, low, high = two_way(errors, parts[0][0][1])
        result: dict[str, Any] = {"mean": mean, "low": low, "high": high, "values": values}
        result["documents"] = errors.shape[1]
    else:
        result = summary(values)
    l0 = [[float(record.metrics["l0"]) for record in side] for side in pairs]
    # Not that of the means: one seed with too few latents makes up for four with too many.
    apart = max(l0, key=lambda pair: abs(pair[0] / pair[1] - 1))
    result |= {"l0": np.mean(l0, axis=0).tolist(), "l0_apart": apart}
    if abs(apart[0] / apart[1] - 1) > NEAR:
        result |= {"low": None, "high": None}
    return result


def _parts(record: Record, metric: str) -> tuple[Array, Array]:
    columns = []
    for names in PARTS[metric]:
        own = [np.asarray(record.by_document[name], dtype=np.float64) for name in names]
        columns.append(own[0] - own[1] if len(own) == 2 else own[0])
    return columns[0], columns[1]

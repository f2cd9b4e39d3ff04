"""The absorption table of MP-SAE (Costa et al., 2025, arXiv 2506.03093, table 1): weak children of strong parents.

The paper's rows are means of the children's activations, its columns their standard deviations; the latter could not
be read, and those here are the ones with which its published code gives the table's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from saelab.data.synthetic import Tree
from saelab.reproduce.ledger import Row, above, all_of, below, decided, paired, summary
from saelab.reproduce.toys import Kind
from saelab.reproduce.tree import RECOVERED, TreeScore, child_magnitudes, run_toys

PAPER = "mp-sae"
RIVALS: tuple[Kind, ...] = ("vanilla", "batch_topk")
KINDS: tuple[Kind, ...] = ("pursuit", "matryoshka", *RIVALS)
MEANS, SDS = (1.0, 0.5, 0.1), (0.02, 0.05, 0.1)
Scores = dict[str, list[list[TreeScore]]]  # by kind, for each standard deviation one score per seed


def absorption(seeds: Sequence[int], steps: int, quick: bool) -> list[Row]:
    """The rows of the ledger; a short run shows the first only."""
    means, sds = (MEANS[:1], SDS[-1:]) if quick else (MEANS, SDS)
    grid = list(product(means, sds))
    trees = [Tree(0.0, child_magnitudes(mean, sd), seed=seed) for mean, sd in grid for seed in seeds]
    found = {kind: run_toys(kind, trees, [*seeds] * len(grid), steps) for kind in KINDS}

    def at(mean: float) -> Scores:
        first = means.index(mean) * len(sds)
        pieces = [slice(i * len(seeds), (i + 1) * len(seeds)) for i in range(first, first + len(sds))]
        return {kind: [scores[piece] for piece in pieces] for kind, scores in found.items()}

    setting = f"children N(MEAN, sd^2) with sd {', '.join(map(str, sds))}, {steps} steps, {len(seeds)} seeds"
    setting = "parents N(1, 0.25^2), " + setting
    rows = [_strong(at(1.0), setting.replace("MEAN", "1.0"))]
    if not quick:
        rows.append(_nested(at(1.0), setting.replace("MEAN", "1.0")))
        rows.append(_medium(at(0.5), setting.replace("MEAN", "0.5")))
        rows.append(_weak(at(0.1), setting.replace("MEAN", "0.1")))
    return rows


def _strong(scores: Scores, setting: str) -> Row:
    cosine = {kind: _by_seed(scores[kind], "absorption") for kind in KINDS}
    holds = np.median(cosine["pursuit"]) < 0.02 and all(np.median(cosine[kind]) > 0.3 for kind in RIVALS)
    return Row(
        PAPER, "at child mean 1.0 pursuit hardly absorbs (0.001); vanilla 0.45-0.47, BatchTopK 0.42-0.48 do", setting,
        _measured(scores), decided(bool(holds)),
        "medians over seeds: pursuit below 0.02, vanilla and BatchTopK above 0.3", True, "absorption.pursuit",
    )  # fmt: skip


def _nested(scores: Scores, setting: str) -> Row:
    mean = float(np.mean(_by_seed(scores["matryoshka"], "absorption")))
    return Row(
        PAPER, "at child mean 1.0 Matryoshka absorbs (0.15-0.22)", setting, _measured(scores),
        decided(0.1 < mean < 0.3), "mean over seeds between 0.1 and 0.3", True, "absorption.matryoshka",
    )  # fmt: skip


def _medium(scores: Scores, setting: str) -> Row:
    measured = _measured(scores)
    return Row(
        PAPER, "at child mean 0.5 pursuit (0.04-0.07) absorbs less than vanilla (0.70) and BatchTopK (0.49-0.54)",
        setting, measured, all_of([below(measured["differences"][kind]) for kind in RIVALS]),
        "paired differences over seeds, whole 95 % intervals below zero", True, "absorption.pursuit",
    )  # fmt: skip


def _weak(scores: Scores, setting: str) -> Row:
    measured = _measured(scores)
    found = _by_seed(scores["pursuit"], "children_recovered")
    more = {kind: paired(found, _by_seed(scores[kind], "children_recovered")) for kind in KINDS[1:]}
    return Row(
        PAPER, "at child mean 0.1 pursuit finds the children (absorption 0.004), the others do not", setting,
        {**measured, "more_recovered": more}, all_of([decided(min(found) > 0.9), *map(above, more.values())]),
        f"children with a matched cosine of {RECOVERED}: over 90 % in every seed with pursuit, and more than with each "
        "other kind, whole 95 % intervals above zero", True, "children_recovered.pursuit",
    )  # fmt: skip


def _by_seed(scores: list[list[TreeScore]], name: str) -> list[float]:
    """The magnitude of a score per seed, averaged over the standard deviations."""
    return np.abs([[getattr(s, name) for s in row] for row in scores]).mean(axis=0).tolist()


def _measured(scores: Scores) -> dict[str, Any]:
    cosine = {kind: _by_seed(found, "absorption") for kind, found in scores.items()}
    recovered = {kind: _by_seed(found, "children_recovered") for kind, found in scores.items()}
    return {
        "absorption": {kind: summary(values) for kind, values in cosine.items()},
        "differences": {kind: paired(cosine["pursuit"], cosine[kind]) for kind in KINDS[1:]},
        "children_recovered": {kind: summary(values) for kind, values in recovered.items()},
        "by_sd": {kind: [[s.content() for s in row] for row in found] for kind, found in scores.items()},
    }

"""MP-SAE (Costa et al., 2025, arXiv 2506.03093): the hierarchical benchmark, and pursuit on real activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.data.synthetic import Tree
from saelab.metrics import babel, babel_co_selected, effective_rank
from saelab.reproduce.absorption import absorption
from saelab.reproduce.curves import by_budget, verdict, verdicts
from saelab.reproduce.lab import Lab, Spec, table
from saelab.reproduce.ledger import Row, below, decided, paired, summary
from saelab.reproduce.toys import STEPS
from saelab.reproduce.tree import TreeScore, run_toys

PAPER = "mp-sae"
EXACT = 0.99  # matched cosine from which a dictionary counts as recovered
TREE_SEEDS = 15  # of the tree benchmark, as in the paper's table; these SAEs are tiny


def synthetic(folder: Path, seeds: Sequence[int], quick: bool) -> list[Row]:
    """Recovery at three correlations, and the absorption table."""
    steps = 1200 if quick else STEPS
    seeds = seeds if quick else range(max(TREE_SEEDS, len(seeds)))
    return [*_recovery(seeds, steps, quick), *absorption(seeds, steps, quick)]


def _recovery(seeds: Sequence[int], steps: int, quick: bool) -> list[Row]:
    # At 0.3 a seed in three is not there yet after a short run.
    rows, wanted = [], ((0.0, True), (0.6, False)) if quick else ((0.0, True), (0.3, True), (0.6, False))
    trees = [Tree(correlation, seed=seed) for correlation, _ in wanted for seed in seeds]
    found = run_toys("pursuit", trees, [*seeds] * len(wanted), steps)
    for i, (correlation, exact) in enumerate(wanted):
        scores = found[i * len(seeds) : (i + 1) * len(seeds)]
        cosines = [s.mean_cosine for s in scores]
        median = float(np.median(cosines))
        rows.append(
            Row(PAPER, f"recovers the dictionary {'exactly' if exact else 'in part only'} at correlation {correlation}",
                f"tree of 20 features, {steps} steps of 200 samples, free norms, {len(seeds)} seeds",
                {"median_cosine": median, **_content(scores)}, decided((median >= EXACT) == exact),
                f"median over seeds of the mean matched cosine {'at least' if exact else 'below'} {EXACT}; the paper "
                "reports medians of 10 runs", synthetic=True, shows="median_cosine")
        )  # fmt: skip
    return rows


def _content(scores: Sequence[TreeScore]) -> dict[str, Any]:
    rows = [s.content() for s in scores]
    return {name: summary([row[name] for row in rows]) for name in rows[0]}


def specs(lab: Lab, seeds: Sequence[int]) -> list[Spec]:
    """Matching pursuit and TopK at the two smallest budgets: pursuit's time grows with the budget."""
    out = []
    for seed in seeds:
        for k in lab.small_ks:
            out.append(Spec("topk", "topk", lab.scale.d_sae, {"k": k}, seed))
            out.append(Spec("pursuit", "matching_pursuit", lab.scale.d_sae, {"n_steps": k}, seed))
    return out


def real(lab: Lab, seeds: Sequence[int]) -> list[Row]:
    """The claims on a language model's activations."""
    records = lab.measure(specs(lab, seeds))
    setting = f"{lab.cache.manifest.model} {lab.cache.hook_name}, d_sae={lab.scale.d_sae}, budgets {lab.small_ks}"
    gap = by_budget(records, "pursuit", "topk", "fvu")
    columns = ("l0", "fvu", "dead_fraction", "ce_loss_recovered_zero", "kl_div_with_sae")
    return [
        Row(PAPER, "lower FVU than TopK at equal L0", setting,
            {"fvu_difference": gap, "verdicts": verdicts(gap, "below"), "table": table(records, columns)},
            verdict(gap, "below"), "on held-out documents, at both budgets"),
        _geometry(lab, seeds, setting),
    ]  # fmt: skip


def _sample(lab: Lab, n: int) -> torch.Tensor:
    n = min(n, lab.cache.n_split("held_out"))
    return next(lab.cache.batches(n, split="held_out", seed=0)).acts


@torch.no_grad()
def _geometry(lab: Lab, seeds: Sequence[int], setting: str, r_max: int = 16) -> Row:
    """Babel curves of whole dictionaries and of co-selected sets, and the effective rank of the codes."""
    x, k, found = _sample(lab, 512), max(lab.small_ks), {}
    for label, variant, config in (("pursuit", "matching_pursuit", {"n_steps": k}), ("topk", "topk", {"k": k})):
        for seed in seeds:
            sae = lab.sae(Spec(label, variant, lab.scale.d_sae, config, seed))
            code = sae.encode(x)
            found.setdefault(label, []).append(
                {"whole": babel(sae.W_dec, r_max).tolist(),
                 "co_selected": babel_co_selected(sae.W_dec, code, r_max).tolist(),
                 "effective_rank": effective_rank(code)}
            )  # fmt: skip
    at = r_max - 1
    gap = paired([r["co_selected"][at] for r in found["pursuit"]], [r["co_selected"][at] for r in found["topk"]])
    whole = paired([r["whole"][at] for r in found["pursuit"]], [r["whole"][at] for r in found["topk"]])
    return Row(
        PAPER, "atoms selected together are less coherent than TopK's (conditional orthogonality)",
        setting + f", budget {k}",
        {"babel_co_selected_difference": gap, "babel_whole_difference": whole, "r": r_max, "curves": found},
        below(gap),
        f"Babel function at r={r_max} of the sets each of 512 held-out tokens selects: whole 95 % interval below zero",
    )  # fmt: skip

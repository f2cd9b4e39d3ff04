"""Causal tasks on pooled passages: spurious-correlation removal (SCR) and targeted probe perturbation (TPP).

Definitions of SAEBench (Karvonen et al., 2025), with two differences: probes are scikit-learn's logistic regressions on
standardised activations, and a signed latent counts as two poles. Ablating a pole keeps the SAE's error in place. The
latents chosen by attribution are compared with the same number of random ones, and with removal of the difference of
means. Where latents have two signs, ``whole_latents`` holds the scores in SAEBench's unit, the latent with its sign.

An audit of the benchmarks (Chanin, 2026, arXiv 2605.18229) found that both tasks should not be used to evaluate SAEs:
``AUDIT`` says why, and stands beside every result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from saelab.errors import UserError
from saelab.evaluation.tasks.passages import Passages, Pooled, frequent
from saelab.evaluation.tasks.probing import MIN_CLASS, Standardised

N_ABLATED = (2, 5, 10, 20, 50, 100)
AUDIT = (
    "an audit (arXiv 2605.18229) advises against SCR and TPP: TPP falls as SAEs train longer, SCR with many latents "
    "ablated falls as recovery of known features rises; compare SAEs by k-sparse probing"
)
SMALLEST_GAP = 1e-3  # of accuracy; below it there is nothing to repair and the score is 0


def attribution(pooled: Pooled, rows: np.ndarray, y: np.ndarray, w: np.ndarray, signed: bool) -> np.ndarray:
    """Effect of each pole on a probe: ``(mean over positives - mean over negatives) * (w . d_j)``.

    SCR takes its magnitude; TPP (``signed``) keeps the sign and drops poles that fire less on positives.
    """
    gap = pooled.z[rows][y].mean(0) - pooled.z[rows][~y].mean(0)
    effect = pooled.directions @ w
    return np.maximum(gap, 0) * effect if signed else np.abs(gap * effect)


def whole_latents(pooled: Pooled) -> Pooled:
    """The same passages with latents as units, whose values keep their sign, in place of poles."""
    return replace(pooled, z=pooled.latents, directions=pooled.directions[: pooled.latents.shape[1]])


def has_poles(pooled: Pooled) -> bool:
    """Whether latents have two signs, so that a pole is not a whole latent."""
    return pooled.z.shape[1] != pooled.latents.shape[1]


def ablate(pooled: Pooled, rows: np.ndarray, poles: np.ndarray) -> np.ndarray:
    """Pooled activations of ``rows`` with the contribution of ``poles`` removed, the SAE's error kept."""
    return pooled.x[rows] - pooled.z[rows][:, poles] @ pooled.directions[poles]


def project_out(x: np.ndarray, direction: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """``x`` with its deviation from ``centre`` along ``direction`` removed."""
    unit = direction / (np.linalg.norm(direction) + 1e-12)
    return x - np.outer((x - centre) @ unit, unit)


@dataclass(frozen=True)
class _Cells:
    """Passages of the four combinations of two binary labels, equally many, split into train and test."""

    train: dict[tuple[bool, bool], np.ndarray]
    test: dict[tuple[bool, bool], np.ndarray]

    def select(self, part: dict, wanted: list[tuple[bool, bool]], which: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.concatenate([part[cell] for cell in wanted])
        return rows, np.concatenate([np.full(part[cell].size, cell[which]) for cell in wanted])


_ALL = [(True, True), (True, False), (False, True), (False, False)]
_CONFOUNDED = [(True, True), (False, False)]


def _cells(a: np.ndarray, b: np.ndarray, seed: int, min_cell: int) -> _Cells:
    rng = np.random.default_rng(seed)
    rows = {cell: rng.permutation(np.flatnonzero((a == cell[0]) & (b == cell[1]))) for cell in _ALL}
    size = min(found.size for found in rows.values())
    if size < min_cell:
        raise UserError(f"a combination of the two labels has {size} passages, fewer than {min_cell}; add such text")
    n_test = max(1, size // 4)
    return _Cells({c: r[n_test:size] for c, r in rows.items()}, {c: r[:n_test] for c, r in rows.items()})


def scr(
    pooled: Pooled, a: np.ndarray, b: np.ndarray, ns: tuple[int, ...] = N_ABLATED, seed: int = 0, min_cell: int = 8
) -> dict[str, Any]:
    """SCR of two binary labels: repair a probe that was trained where both coincide.

    ``score[n] = (acc_after - acc_before) / (acc_clean - acc_before)``, accuracies of the biased probe on the intended
    label over a balanced test set, after ablating the n poles that matter most for the *other* label. Of the two
    directions (a, then b as the intended label) the one with the lower initial accuracy is reported.
    """
    cells = _cells(a, b, seed, min_cell)
    both = [_scr_direction(pooled, cells, i, ns, seed) for i in (0, 1)]
    chosen = min(both, key=lambda r: r["accuracy_before"])
    return {**chosen, "score_by_intended": [r["score"] for r in both]}


def scr_over_classes(
    pooled: Pooled, a: np.ndarray, b: np.ndarray, ns: tuple[int, ...] = N_ABLATED, seed: int = 0, min_cell: int = 8
) -> dict[str, Any]:
    """Mean SCR over binary tasks: each frequent class of ``a`` against the rest, crossed with the commonest of ``b``.

    Classes without ``min_cell`` passages in each of the four combinations have no such task and are left out.
    """
    spurious = b == frequent(b, 2 * min_cell)[0]
    classes = frequent(a, 2 * min_cell, max_classes=20)
    classes = classes[:1] if len(set(a)) == 2 else classes  # the other class would be the same task
    results = []
    for name in classes:
        if min(((a == name) == x)[spurious == y].sum() for x, y in _ALL) >= min_cell:
            results.append(scr(pooled, a == name, spurious, ns, seed, min_cell))
    if not results:
        raise UserError(f"no class has {min_cell} passages in each combination of the two labels; add labelled text")
    out: dict[str, Any] = {"tasks": len(results), "test_passages": sum(r["test_passages"] for r in results)}
    for key in ("accuracy_before", "accuracy_clean", "score_difference_of_means"):
        out[key] = float(np.mean([r[key] for r in results]))
    for key in ("score", "score_random_latents"):
        out[key] = {n: float(np.mean([r[key][n] for r in results])) for n in ns}
    out["score_by_intended"] = [
        {n: float(np.mean([r["score_by_intended"][i][n] for r in results])) for n in ns} for i in (0, 1)
    ]
    out["warning"] = AUDIT
    if has_poles(pooled):
        out["whole_latents"] = scr_over_classes(whole_latents(pooled), a, b, ns, seed, min_cell)
    return out


def _scr_direction(pooled: Pooled, cells: _Cells, intended: int, ns: tuple[int, ...], seed: int) -> dict[str, Any]:
    spurious = 1 - intended
    rows, y = cells.select(cells.train, _CONFOUNDED, intended)
    biased = Standardised(pooled.x[rows], y)
    all_rows, other = cells.select(cells.train, _ALL, spurious)
    probe = Standardised(pooled.x[all_rows], other)
    clean = Standardised(pooled.x[all_rows], cells.select(cells.train, _ALL, intended)[1])
    test, truth = cells.select(cells.test, _ALL, intended)
    before = biased.correct(pooled.x[test], truth).mean()
    gap = clean.correct(pooled.x[test], truth).mean() - before

    def score(x: np.ndarray) -> float:
        return float((biased.correct(x, truth).mean() - before) / gap) if gap >= SMALLEST_GAP else 0.0

    order = np.argsort(-attribution(pooled, all_rows, other, probe.coef, signed=False), kind="stable")
    # Poles that never fire cannot change anything; a random choice among them would be no baseline.
    firing = np.flatnonzero(pooled.z[all_rows].any(0))
    shuffled = np.random.default_rng(seed).permutation(firing)
    direction = pooled.x[all_rows][other].mean(0) - pooled.x[all_rows][~other].mean(0)
    return {
        "intended": intended,
        "accuracy_before": float(before),
        "accuracy_clean": float(before + gap),
        "score": {n: score(ablate(pooled, test, order[:n])) for n in ns},
        "score_random_latents": {n: score(ablate(pooled, test, shuffled[:n])) for n in ns},
        "score_difference_of_means": score(project_out(pooled.x[test], direction, pooled.x[all_rows].mean(0))),
        "test_passages": int(test.size),
    }


def tpp(
    pooled: Pooled,
    passages: Passages,
    label: str,
    ns: tuple[int, ...] = N_ABLATED,
    seed: int = 0,
    min_class: int = MIN_CLASS,
) -> dict[str, Any]:
    """TPP: ablating the poles of one class should hurt its own probe and spare the others.

    ``score[n]`` is the drop of class i's probe after ablating its n top poles, minus the mean drop of the other probes,
    averaged over classes. At least three classes are needed: with two, each probe is the negative of the other, and
    both drop together.
    """
    values = passages.column(label)
    classes = frequent(values, min_class)
    if len(classes) < 3:
        raise UserError(f"tpp needs three classes of {min_class} passages; label {label!r} has two: name another label")
    rng = np.random.default_rng(seed)
    size = min(int((values == name).sum()) for name in classes)
    rows = {name: rng.permutation(np.flatnonzero(values == name))[:size] for name in classes}
    n_test = max(1, size // 4)
    train = np.concatenate([r[n_test:] for r in rows.values()])
    test = np.concatenate([r[:n_test] for r in rows.values()])
    probes = {name: Standardised(pooled.x[train], values[train] == name, balanced=True) for name in classes}

    def accuracies(x: np.ndarray) -> dict[str, float]:
        return {name: float(_balanced(probe.correct(x, values[test] == name), values[test] == name))
                for name, probe in probes.items()}  # fmt: skip

    before = accuracies(pooled.x[test])
    scores, random_scores, intended = {n: [] for n in ns}, {n: [] for n in ns}, {n: [] for n in ns}
    for name, probe in probes.items():
        order = np.argsort(-attribution(pooled, train, values[train] == name, probe.coef, signed=True), kind="stable")
        shuffled = rng.permutation(np.flatnonzero(pooled.z[train].any(0)))
        for n in ns:
            for poles, into in ((order[:n], scores), (shuffled[:n], random_scores)):
                after = accuracies(ablate(pooled, test, poles))
                drop = {c: before[c] - after[c] for c in classes}
                into[n].append(drop[name] - np.mean([drop[c] for c in classes if c != name]))
                if into is scores:
                    intended[n].append(drop[name])
    unit = whole_latents(pooled)
    whole = tpp(unit, passages, label, ns, seed, min_class) if has_poles(pooled) else None
    return {
        "classes": len(classes),
        "accuracy_before": float(np.mean(list(before.values()))),
        "score": {n: float(np.mean(v)) for n, v in scores.items()},
        "score_random_latents": {n: float(np.mean(v)) for n, v in random_scores.items()},
        "drop_intended": {n: float(np.mean(v)) for n, v in intended.items()},
        "test_passages": int(test.size),
        "warning": AUDIT,
        **({"whole_latents": whole} if whole else {}),
    }


def _balanced(correct: np.ndarray, y: np.ndarray) -> float:
    """Accuracy with both sides counting alike: one class against many others is not balanced by itself."""
    return float((correct[y].mean() + correct[~y].mean()) / 2)

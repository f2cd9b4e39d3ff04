"""Sparse probing: accuracy of k latents on a concept, compared with channels, the whole activation and directions.

After SAEBench (Karvonen et al., 2025): one balanced one-against-the-rest task per class on mean-pooled passages; the k
latents with the largest absolute difference of class means on the training part; scikit-learn's logistic regression
(L2, C = 1); accuracy on the test part. Always reported beside it: the dense probe, k raw channels, the projection on
the difference of means, and the projection on a random direction.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from saelab.errors import UserError
from saelab.evaluation.tasks.passages import Passages, Pooled, frequent
from saelab.metrics.intervals import Estimate, bootstrap

if TYPE_CHECKING:  # imported by the first probe: it takes longer than most commands that can reach this module
    from sklearn.linear_model import LogisticRegression

MIN_CLASS = 20  # passages of a class below which accuracies mean little


@dataclass(frozen=True)
class Task:
    """One binary task: passage numbers of the two parts, and which of them are positive."""

    name: str
    train: np.ndarray
    train_y: np.ndarray
    test: np.ndarray
    test_y: np.ndarray


def tasks(values: np.ndarray, seed: int = 0, min_class: int = MIN_CLASS, test_share: float = 0.25) -> list[Task]:
    """A balanced binary task per frequent class: its passages against as many others, split into train and test."""
    rng = np.random.default_rng(seed)
    out = []
    for name in frequent(values, min_class):
        positive, negative = np.flatnonzero(values == name), np.flatnonzero(values != name)
        size = min(positive.size, negative.size)
        if size < min_class:
            continue
        n_test = max(1, round(test_share * size))
        pos, neg = rng.permutation(positive)[:size], rng.permutation(negative)[:size]
        test, train = np.concatenate([pos[:n_test], neg[:n_test]]), np.concatenate([pos[n_test:], neg[n_test:]])
        y = [np.repeat([True, False], (m, m)) for m in (size - n_test, n_test)]
        out.append(Task(str(name), train, y[0], test, y[1]))
        if len(set(values)) == 2:  # the other class would be the same task
            break
    if not out:
        raise UserError(f"no class has {min_class} passages and as many against it; add labelled text")
    return out


def logistic(x: np.ndarray, y: np.ndarray, C: float = 1.0, balanced: bool = False) -> LogisticRegression:
    """scikit-learn's logistic regression with L2; hitting its iteration limit is accepted, as SAEBench accepts it.

    ``balanced`` lets both classes count alike, however many examples they have.
    """
    # On problems this small, threads of the linear algebra library wait for each other longer than they work.
    with threadpool_limits(limits=1):
        return fitted(x, y, C, balanced)


def fitted(x: np.ndarray, y: np.ndarray, C: float = 1.0, balanced: bool = False) -> LogisticRegression:
    """:func:`logistic` for a caller who has limited the threads, which takes longer than a small fit."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        weight = "balanced" if balanced else None
        return LogisticRegression(C=C, max_iter=1000, class_weight=weight).fit(x, y)


class Standardised:
    """A probe on standardised inputs: its weights in units of the raw ones are ``coef``."""

    def __init__(self, x: np.ndarray, y: np.ndarray, balanced: bool = False) -> None:
        self.mean, self.sd = x.mean(0), x.std(0) + 1e-8
        self.probe = logistic((x - self.mean) / self.sd, y, balanced=balanced)
        self.coef = self.probe.coef_[0] / self.sd

    def correct(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether each passage is classified as labelled."""
        return self.predict(x) == y

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The class of each passage."""
        return np.asarray(self.probe.predict((x - self.mean) / self.sd))


def top_columns(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """The k columns with the largest absolute difference of class means."""
    gap = np.abs(x[y].mean(0) - x[~y].mean(0))
    return np.argsort(-gap, kind="stable")[:k]


def _k_sparse(x: np.ndarray, task: Task, k: int) -> np.ndarray:
    columns = top_columns(x[task.train], task.train_y, k)
    probe = logistic(x[task.train][:, columns], task.train_y)
    return np.asarray(probe.predict(x[task.test][:, columns])) == task.test_y


def _projected(x: np.ndarray, direction: np.ndarray, task: Task) -> np.ndarray:
    along = (x @ direction)[:, None]
    scale = along[task.train].std() + 1e-12
    probe = logistic(along[task.train] / scale, task.train_y)
    return np.asarray(probe.predict(along[task.test] / scale)) == task.test_y


def sparse_probing(
    pooled: Pooled, passages: Passages, label: str, ks: tuple[int, ...] = (1, 2, 5), seed: int = 0
) -> dict[str, Estimate]:
    """Test accuracies, averaged over classes with equal weight, with bootstrap intervals over test passages."""
    rng = np.random.default_rng(seed)
    correct: dict[str, list[np.ndarray]] = {}
    for task in tasks(passages.column(label), seed):
        train, y = pooled.x[task.train], task.train_y
        rows: dict[str, Any] = {f"sae_top_{k}": _k_sparse(pooled.latents, task, k) for k in ks}
        rows |= {f"channels_top_{k}": _k_sparse(pooled.x, task, k) for k in ks}
        rows["dense_probe"] = Standardised(train, y).correct(pooled.x[task.test], task.test_y)
        rows["difference_of_means"] = _projected(pooled.x, train[y].mean(0) - train[~y].mean(0), task)
        rows["random_direction"] = _projected(pooled.x, rng.standard_normal(pooled.x.shape[1]), task)
        for name, values in rows.items():
            correct.setdefault(name, []).append(values)
    return {f"{name}_test_accuracy": _accuracy(parts, name, label) for name, parts in correct.items()}


def _accuracy(parts: list[np.ndarray], name: str, label: str) -> Estimate:
    # Every class counts alike, however many test passages it has.
    weighted = np.concatenate([part / part.size for part in parts]) * sum(part.size for part in parts) / len(parts)
    low, high = bootstrap(weighted, np.mean)
    n = weighted.size
    formula = f"test accuracy of a logistic regression on {name}, mean over {len(parts)} classes of {label!r}"
    return Estimate(float(weighted.mean()), low, high, n, "passage", formula, f"95 % bootstrap over {n} test passages")

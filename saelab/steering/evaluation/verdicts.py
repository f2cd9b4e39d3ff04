"""From scores to verdicts: the strength is chosen on some instructions, and methods are compared on others.

Each method's strength is, for each concept, the one with the best mean overall score on the instructions of the split
"choose"; everything reported is measured on the split "test". A difference of two methods is taken within each concept
(over the same instructions and seeds), and its interval is over concepts: Student's 95 % interval of the mean. With one
concept it is over seeds, and says nothing about other concepts.

*At equal damage*: damage is the surprise of the answers (see :mod:`saelab.steering.evaluation.proxies`). The concept
score of a method is read off its curve over its strengths, interpolated linearly from the unsteered answers on, at the
damage that the other method has at its chosen strength. Where the curve does not get that far its end counts, and
``short`` says for which share of the concepts that was so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from saelab.metrics.intervals import t_interval
from saelab.steering.evaluation.answers import Row

SCORES = ("concept", "instruction", "fluency", "overall")
REFERENCES = ("prompt", "difference-of-means", "random")
UNSTEERED = "none"
SAME = 1e-4  # of a score: a text has it up to rounding, whatever stands in the batch beside it


@dataclass(frozen=True)
class Scored:
    """An answer's scores, from 0 to 2; the surprise in nats per token."""

    row: Row
    concept: float
    instruction: float
    fluency: float
    overall: float
    surprise: float


@dataclass(frozen=True)
class Difference:
    """One method minus another, in one score."""

    method: str
    reference: str
    score: str  # one of SCORES at the chosen strengths, or "concept at equal damage"
    mean: float
    low: float | None  # of the 95 % interval; None where there is none
    high: float | None
    concepts: int
    over: str  # what the interval is over
    verdict: str  # "better", "worse" or "cannot tell"
    short: float = 0.0  # at equal damage: share of concepts in which a curve did not get that far

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass
class Table:
    """Scored answers by concept, method and level, and the chosen levels."""

    scored: Sequence[Scored]
    unsure: Mapping[str, str] = field(default_factory=dict)  # score -> why it cannot be believed

    def __post_init__(self) -> None:
        self.cells: dict[tuple[str, str, str, int], list[Scored]] = defaultdict(list)
        for s in self.scored:
            self.cells[s.row.split, s.row.concept, s.row.method, s.row.level].append(s)
        self.concepts = list(dict.fromkeys(s.row.concept for s in self.scored))
        self.methods = list(dict.fromkeys(s.row.method for s in self.scored))
        self.chosen = {(c, m): self._choose(c, m) for c in self.concepts for m in self.methods}

    def levels(self, concept: str, method: str) -> list[int]:
        """The levels of a method that were measured on the test instructions."""
        return sorted(level for split, c, m, level in self.cells if (split, c, m) == ("test", concept, method))

    def _choose(self, concept: str, method: str) -> int:
        levels = self.levels(concept, method)
        means = [_mean(self.cells["choose", concept, method, level], "overall") for level in levels]
        if not levels:
            return 0
        return levels[int(np.argmax(np.nan_to_num(means, nan=-1.0)))]  # the mildest of equal ones

    def value(self, concept: str, method: str, score: str, level: int | None = None, seed: int | None = None) -> float:
        """Mean score on the test instructions, at the chosen level unless another is given."""
        level = self.chosen[concept, method] if level is None else level
        cell = self.cells["test", concept, method, level]
        return _mean([s for s in cell if seed is None or s.row.seed == seed], score)

    def means(self) -> list[dict[str, Any]]:
        """One row per method: mean over concepts of each score at the chosen strength, with its interval."""
        rows = []
        for method in self.methods:
            row: dict[str, Any] = {"method": method, "concepts": len(self.concepts)}
            for score in (*SCORES, "surprise"):
                values = np.array([self.value(c, method, score) for c in self.concepts])
                low, high = t_interval(values) if len(values) > 1 else (None, None)
                row[score] = {"mean": float(values.mean()), "low": low, "high": high}
            levels = [self.chosen[c, method] for c in self.concepts]
            rows.append(row | {"levels": {str(level): levels.count(level) for level in sorted(set(levels))}})
        return rows

    def curves(self) -> dict[str, list[dict[str, float]]]:
        """For each method one point per level, means over concepts."""
        found = {}
        for method in self.methods:
            levels = sorted({level for c in self.concepts for level in self.levels(c, method)})
            found[method] = [
                {"level": float(level)}
                | {
                    s: float(np.mean([self.value(c, method, s, level) for c in self.concepts]))
                    for s in (*SCORES, "surprise")
                }
                for level in levels
            ]
        return found

    def differences(self) -> list[Difference]:
        """Every method against prompting, the difference of means and random directions, as far as they were run."""
        found = []
        for reference in (r for r in REFERENCES if r in self.methods):
            for method in self.methods:
                if method in (reference, UNSTEERED):
                    continue
                found += [self._difference(method, reference, score) for score in SCORES]
                found.append(self._at_equal_damage(method, reference))
        return found

    def _difference(self, method: str, reference: str, score: str) -> Difference:
        seeds = sorted({s.row.seed for s in self.scored})
        by_seed = np.array(
            [[self.value(c, method, score, seed=s) - self.value(c, reference, score, seed=s) for s in seeds]
             for c in self.concepts]
        )  # fmt: skip
        return self._judged(method, reference, score, by_seed)

    def _at_equal_damage(self, method: str, reference: str) -> Difference:
        values, short = [], 0
        for concept in self.concepts:
            damage = self.value(concept, reference, "surprise")
            mine, reached = self._at(concept, method, damage)
            short += not reached
            values.append([mine - self.value(concept, reference, "concept")])
        share = short / max(len(self.concepts), 1)
        return self._judged(method, reference, "concept at equal damage", np.array(values), share)

    def _at(self, concept: str, method: str, damage: float) -> tuple[float, bool]:
        """The concept score of a method at a damage, and whether its curve gets there."""
        none = UNSTEERED if UNSTEERED in self.methods else None
        start = (self.value(concept, none, "surprise"), self.value(concept, none, "concept")) if none else (0.0, 0.0)
        levels = self.levels(concept, method)
        points = [
            start,
            *((self.value(concept, method, "surprise", n), self.value(concept, method, "concept", n)) for n in levels),
        ]
        x, y = np.array(points).T
        x = np.maximum.accumulate(x)  # a curve that bends back is followed up to where it first got
        return float(np.interp(damage, x, y)), bool(x[-1] >= damage)

    def _judged(self, method: str, reference: str, score: str, by_seed: np.ndarray, short: float = 0.0) -> Difference:
        """``by_seed [concepts, seeds]`` of differences."""
        by_concept = by_seed.mean(1)
        low = high = None
        over = "nothing: one concept and one seed"
        if len(by_concept) > 1:
            (low, high), over = t_interval(by_concept), f"{len(by_concept)} concepts"
        elif by_seed.shape[1] > 1 and np.ptp(by_seed[0]) < SAME:
            over = f"nothing: one concept, with the same answers for all {by_seed.shape[1]} seeds"
        elif by_seed.shape[1] > 1:
            (low, high), over = t_interval(by_seed[0]), f"{by_seed.shape[1]} seeds of one concept"
        unsure = [s for s in _needed(score) if s in self.unsure]
        if unsure or low is None or high is None:
            verdict = "cannot tell"
        else:
            verdict = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
        mean = float(by_concept.mean())
        return Difference(method, reference, score, mean, low, high, len(by_concept), over, verdict, short)


def _needed(score: str) -> tuple[str, ...]:
    """The scores that one rests on: the overall score, by which strengths are chosen, on all of them."""
    return ("concept", "instruction", "fluency") if score == "overall" else (score.removesuffix(" at equal damage"),)


def _mean(cell: Sequence[Scored], score: str) -> float:
    values = [getattr(s, score) for s in cell]
    values = [v for v in values if v == v]
    return float(np.mean(values)) if values else float("nan")

"""Detection and fuzzing: how well a description predicts where a latent fires (Paulo et al., 2024, arXiv 2410.13928).

*Detection*: firing and silent windows, shuffled; a judge says of each whether the described pattern occurs. *Fuzzing*:
the same windows with tokens marked, in firing windows those that fire, in silent ones the places marked in a firing
window drawn at random; the judge says whether the marks are right. Windows are judged a few at a time. Windows whose
answer cannot be read are left out and counted.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saelab.features.explanations import prompts
from saelab.features.explanations.requests import Client
from saelab.features.schema import Example


@dataclass(frozen=True)
class JudgeScore:
    """Counts of a judge's answers; every rate is a property of them.

    ``guess_nothing`` is the accuracy of answering 0 throughout, ``guess_everything_f1`` the F1 of answering 1: what a
    judge reaches without reading. Balanced accuracy is 0.5 for either.
    """

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    unanswered: int

    @property
    def answered(self) -> int:
        """Windows the judge gave a usable answer on."""
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return _ratio(self.true_positives + self.true_negatives, self.answered)

    @property
    def recall(self) -> float:
        """Share of the positive windows that were called so."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def precision(self) -> float:
        """Share of the windows called positive that are."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def specificity(self) -> float:
        """Share of the negative windows that were called so."""
        return _ratio(self.true_negatives, self.true_negatives + self.false_positives)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of recall and specificity; guessing gives 0.5."""
        return (self.recall + self.specificity) / 2

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    @property
    def guess_nothing(self) -> float:
        """Accuracy of calling every window negative."""
        return _ratio(self.true_negatives + self.false_positives, self.answered)

    @property
    def guess_everything_f1(self) -> float:
        """F1 of calling every window positive."""
        share = _ratio(self.true_positives + self.false_negatives, self.answered)
        return 2 * share / (1 + share)

    def row(self) -> dict[str, Any]:
        """Counts and rates, for JSON; a rate without a denominator is null."""
        rates = ("accuracy", "balanced_accuracy", "f1", "precision", "recall", "guess_nothing", "guess_everything_f1")
        values = {name: getattr(self, name) for name in rates}
        return {**asdict(self), **{name: None if v != v else v for name, v in values.items()}}


def detection(
    client: Client, explanation: str, firing: Sequence[Example], silent: Sequence[Example], shown: int, seed: int
) -> JudgeScore:
    """Have the judge tell firing windows from silent ones."""
    samples = [("".join(e.strings), True) for e in firing] + [("".join(e.strings), False) for e in silent]
    return _judge(client, prompts.DETECT, explanation, samples, shown, seed)


def fuzzing(
    client: Client,
    explanation: str,
    firing: Sequence[Example],
    silent: Sequence[Example],
    shown: int,
    seed: int,
    threshold: float = 0.0,
) -> JudgeScore:
    """Have the judge tell right marks from misplaced ones."""
    rng = random.Random(seed)
    places = [prompts.active_places(e, threshold) for e in firing]
    samples = [(prompts.marked(e, own), True) for e, own in zip(firing, places)]
    for example in silent:
        borrowed = rng.choice(places) if places else []
        inside = [p for p in borrowed if p < len(example.strings)] or [example.focus]
        samples.append((prompts.marked(example, inside), False))
    return _judge(client, prompts.FUZZ, explanation, samples, shown, seed)


def _judge(
    client: Client, instruction: str, explanation: str, samples: list[tuple[str, bool]], shown: int, seed: int
) -> JudgeScore:
    samples = list(samples)
    random.Random(seed).shuffle(samples)
    tally = {(True, True): 0, (False, True): 0, (False, False): 0, (True, False): 0}  # (truth, answer)
    unanswered = 0
    for start in range(0, len(samples), shown):
        batch = samples[start : start + shown]
        answers = parse(client.ask(prompts.judge(instruction, explanation, [text for text, _ in batch])), len(batch))
        if answers is None:
            unanswered += len(batch)
            continue
        for (_, truth), answer in zip(batch, answers):
            tally[truth, answer] += 1
    return JudgeScore(tally[True, True], tally[False, True], tally[False, False], tally[True, False], unanswered)


def parse(answer: str, n: int) -> list[bool] | None:
    """The last bracketed list of ``n`` zeros and ones in an answer; None where there is none."""
    for found in reversed(re.findall(r"\[[^\[\]]*\]", answer)):
        try:
            values = json.loads(found)
        except ValueError:
            continue
        if len(values) == n and all(value in (0, 1) for value in values):
            return [bool(value) for value in values]
    return None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")

"""A language model as judge: three ratings from 0 to 2 for each answer, and tests of the judge before it is believed.

The three questions are those of AxBench (Wu et al., 2025, arXiv 2501.17148): is the concept there, does the answer do
what the instruction asks, is it fluent; each is one request, in words of our own. Whether a rating means anything is
measured first, on cases whose answer is known: contrast texts about the concept and not about it; unsteered answers
beside their own instruction and beside another; unsteered answers as they are and with their words shuffled. A judge
that gives the same rating throughout, or rates at random, does not tell these apart. It is also asked twice, in other
words, whether it agrees with itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saelab.errors import UserError
from saelab.features.explanations.client import Message
from saelab.features.explanations.requests import IN_FLIGHT, KeptAnswers, in_parallel

RUBRICS = ("concept", "instruction", "fluency")
LEAST_AUC, LEAST_KAPPA = 0.75, 0.4  # of known cases told apart; of agreement with itself
KNOWN = 24  # known cases of each rubric: half of them good

_ASK = {
    "concept": "How far is the text about this concept: {subject}?\n"
    "0: not at all. 1: it is mentioned, but beside the point or clumsily. 2: clearly, as a part of what the text says.",
    "instruction": "A person was asked: {subject}\nHow far does the text do what was asked?\n"
    "0: it has nothing to do with it. 1: partly. 2: it does what was asked, whatever else it brings in.",
    "fluency": "How well is the text written, whatever it is about?\n"
    "0: it cannot be read: broken, one thing over and over. 1: readable, but odd or repetitive. 2: natural language.",
}
_AGAIN = {
    "concept": "Concept: {subject}\nRate whether the text below deals with it, from 0 (no) over 1 (a little, or badly "
    "fitted in) to 2 (yes, clearly).",
    "instruction": "Task: {subject}\nRate whether the text below fulfils the task, from 0 (not related) over 1 (in "
    "part) to 2 (yes, even if it adds other matters).",
    "fluency": "Rate the language of the text below, from 0 (unreadable or endlessly repeated) over 1 (understandable "
    "but strange) to 2 (like a person's). Ignore what it is about.",
}
_SYSTEM = (
    "You rate texts. The text may be cut off at the end; that does not count. Answer with a single digit: 0, 1 or 2."
)
_DIGIT = re.compile(r"(?<![\d./])([012])(?:\.0+)?(?!\.?\d)")
_OF_TWO = re.compile(r"(?i)(/|\bout of|\bof)\s*2\b")


@dataclass(frozen=True)
class Question:
    """One rating to ask for."""

    rubric: str
    subject: str  # the concept or the instruction; "" for fluency
    text: str
    again: bool = False  # in the other words

    @property
    def messages(self) -> list[Message]:
        """The request."""
        ask = (_AGAIN if self.again else _ASK)[self.rubric].format(subject=self.subject)
        user = f"{ask}\n\nText:\n<<<\n{self.text}\n>>>\n\nRating (0, 1 or 2):"
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}]


def rating(answer: str) -> int | None:
    """The rating in a judge's answer: its last 0, 1 or 2 that is no part of another number; None where there is none.

    What comes after "Rating:" counts before anything else.
    """
    answer = _OF_TWO.sub("", answer)
    tail = re.split(r"(?i)rating\s*[:=]?", answer)[-1]
    found = _DIGIT.findall(tail) or _DIGIT.findall(answer)
    return int(found[-1]) if found else None


def ask_all(
    judge: KeptAnswers,
    questions: Sequence[Question],
    progress: Callable[[int, int], None] | None = None,
    in_flight: int = IN_FLIGHT,
) -> list[int | None]:
    """The rating of each question; None where the judge's answer holds none."""
    ratings: list[int | None] = [None] * len(questions)
    for done, (number, answer) in enumerate(
        in_parallel(lambda question: judge.ask(question.messages), questions, in_flight), 1
    ):
        ratings[number] = rating(answer)
        if progress is not None:
            progress(done, len(questions))
    return ratings


@dataclass(frozen=True)
class RubricCheck:
    """Whether one rubric's ratings can be believed."""

    rubric: str
    known: int  # cases whose answer is known
    auc: float  # of telling the good from the bad ones: 0.5 for a constant or random judge
    good: float  # mean rating of the good ones
    bad: float
    kappa: float  # quadratic-weighted agreement with its own ratings in other words; 0 for chance
    agreement: float  # share of equal ratings
    unreadable: int  # answers without a rating, of all of these

    @property
    def passed(self) -> bool:
        return self.auc >= LEAST_AUC and self.kappa >= LEAST_KAPPA

    @property
    def reason(self) -> str:
        """Why it failed; empty where it passed."""
        if self.passed:
            return ""
        if self.auc < LEAST_AUC:
            return (
                f"it tells {self.rubric} apart with AUC {self.auc:.2f} on {self.known} known cases (0.5 is chance, "
                f"{LEAST_AUC:g} asked)"
            )
        return f"it agrees with itself on {self.rubric} with kappa {self.kappa:.2f} ({LEAST_KAPPA:g} asked)"

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"passed": self.passed, "reason": self.reason}


def check_judge(
    judge: KeptAnswers,
    concepts: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    asked: Sequence[tuple[str, str]],
    seed: int = 0,
    in_flight: int = IN_FLIGHT,
) -> list[RubricCheck]:
    """Rate known cases twice. ``concepts`` are ``(name, positive, negative)`` texts, ``asked`` are ``(instruction,
    unsteered answer)``. Costs at most 144 requests."""
    cases = known_cases(concepts, asked, seed)
    questions = [
        Question(rubric, subject, text, again)
        for again in (False, True)
        for rubric in RUBRICS
        for subject, text, _ in cases[rubric]
    ]
    ratings = iter(ask_all(judge, questions, in_flight=in_flight))
    first, second = ({r: [next(ratings) for _ in cases[r]] for r in RUBRICS} for _ in range(2))
    return [_check(rubric, [good for _, _, good in cases[rubric]], first[rubric], second[rubric]) for rubric in RUBRICS]


def known_cases(
    concepts: Sequence[tuple[str, Sequence[str], Sequence[str]]], asked: Sequence[tuple[str, str]], seed: int
) -> dict[str, list[tuple[str, str, bool]]]:
    """For each rubric ``(subject, text, good)``."""
    rng, half = random.Random(seed), KNOWN // 2
    texts = [
        (name, text, good) for name, yes, no in concepts for good, part in ((True, yes), (False, no)) for text in part
    ]
    cases: dict[str, list[tuple[str, str, bool]]] = {"concept": []}
    for good in (True, False):
        some = [case for case in texts if case[2] is good]
        cases["concept"] += rng.sample(some, min(half, len(some)))
    # One answer to each instruction: beside another seed's answer, an instruction would count as that of another.
    spoken = list({instruction: text for instruction, text in asked if len(text.split()) >= 5}.items())
    if len(spoken) < 4:
        raise UserError(
            f"the judge cannot be tested: unsteered answers to {len(spoken)} instructions have five words, four are "
            "needed; give more instructions"
        )
    own = rng.sample(spoken, min(half, len(spoken)))
    turned = [*own[1:], own[0]]
    cases["instruction"] = [(i, text, True) for i, text in own]
    cases["instruction"] += [(i, text, False) for (i, _), (_, text) in zip(own, turned)]
    cases["fluency"] = [("", text, True) for _, text in own]
    cases["fluency"] += [("", _shuffled(text, rng), False) for _, text in own]
    return cases


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def _check(rubric: str, good: Sequence[bool], first: Sequence[int | None], second: Sequence[int | None]) -> RubricCheck:
    told = [(g, a) for g, a in zip(good, first) if a is not None]
    yes, no = ([a for g, a in told if g is wanted] for wanted in (True, False))
    pairs = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    missing = sum(a is None for a in (*first, *second))
    agreement = sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
    above, beneath = (float(np.mean(part)) if part else 0.0 for part in (yes, no))
    return RubricCheck(rubric, len(told), _auc(yes, no), above, beneath, weighted_kappa(pairs), agreement, missing)


def _auc(yes: Sequence[int], no: Sequence[int]) -> float:
    """The probability that a good case is rated above a bad one, ties counted half."""
    if not yes or not no:
        return 0.5
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no]))


def weighted_kappa(pairs: Sequence[tuple[int, int]]) -> float:
    """Cohen's kappa with quadratic weights (Cohen, 1968); 0 where either side gave one rating throughout."""
    if not pairs:
        return 0.0
    a, b = np.array(pairs, dtype=float).T
    chance = np.square(a[:, None] - b[None, :]).mean()
    if chance == 0 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(1 - np.square(a - b).mean() / chance)

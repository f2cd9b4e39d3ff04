"""What an evaluation found: scores by proxies or by a judge, verdicts, examples to read, as JSON and as a text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from saelab._version import __version__
from saelab.errors import UserError, damaged
from saelab.features.explanations.requests import KeptAnswers
from saelab.files import finite, write_json
from saelab.layout import STEER_EVAL
from saelab.steering.evaluation.answers import Answer
from saelab.steering.evaluation.evaluate import Evaluation
from saelab.steering.evaluation.judge import RUBRICS, Question, RubricCheck, ask_all, check_judge
from saelab.steering.evaluation.proxies import RATING, fluency, harmonic_mean
from saelab.steering.evaluation.verdicts import UNSTEERED, Scored, Table

LEAST_AUC = 0.85  # of the concept classifiers, on average over concepts
EXAMPLES = 3  # per method: the best, the middle and the worst
Scores = Mapping[tuple, tuple[float, float, float]]  # answer and concept -> concept, instruction, fluency


def proxy_scores(evaluation: Evaluation) -> dict[tuple, tuple[float, float, float]]:
    """Concept, instruction and fluency of every answer, by the offline proxies."""
    usual = usual_nats(evaluation)
    found = {}
    for answer, concept in answers_by_concept(evaluation):
        p = answer.proxies
        name = "concept" if answer.row.concept else f"concept {concept}"
        surprise = p.get("nats", math.nan) - usual
        scores = (RATING * p.get(name, 0.0), RATING * max(0.0, p["topic"]), fluency(surprise, answer.tokens))
        found[*answer.row.key, concept] = scores
    return found


def usual_nats(evaluation: Evaluation) -> float:
    """Nats per token of the unsteered answers, on average: what no surprise is."""
    own = [a.proxies["nats"] for a in evaluation.kept.answers.values() if not a.row.concept and "nats" in a.proxies]
    return float(np.mean(own)) if own else 0.0


def answers_by_concept(evaluation: Evaluation) -> list[tuple[Answer, str]]:
    """Every answer with a concept that it is looked at for: the unsteered ones with each."""
    done = [
        c.name for c in evaluation.concepts if any(a.row.concept == c.name for a in evaluation.kept.answers.values())
    ]
    found = []
    for answer in evaluation.kept.answers.values():
        found += [(answer, name) for name in ([answer.row.concept] if answer.row.concept else done) if name in done]
    return found


def judge_questions(evaluation: Evaluation) -> list[tuple[tuple, Question]]:
    """The key of an answer and a concept, and a question about it; those of an unsteered answer are asked once."""
    found = []
    for answer, concept in answers_by_concept(evaluation):
        instruction = evaluation.instructions[answer.row.instruction]
        for rubric, subject in zip(RUBRICS, (concept, instruction, "")):
            found.append(((*answer.row.key, concept), Question(rubric, subject, answer.text)))
    return found


def judged_scores(
    evaluation: Evaluation, judge: KeptAnswers, progress: Callable[[int, int], None] | None = None
) -> dict[tuple, tuple[float, float, float]]:
    """The judge's ratings; an answer with one that cannot be read is left out."""
    pairs = judge_questions(evaluation)
    unique = list(dict.fromkeys(question for _, question in pairs))
    ratings = dict(zip(unique, ask_all(judge, unique, progress)))
    found: dict[tuple, list[int | None]] = {}
    for key, question in pairs:
        found.setdefault(key, []).append(ratings[question])
    return {key: tuple(map(float, row)) for key, row in found.items() if None not in row}  # type: ignore[misc]


def check(evaluation: Evaluation, judge: KeptAnswers) -> list[RubricCheck]:
    """Test the judge on cases whose answer is known."""
    held = [(c.name, evaluation.halves[c.name][1]) for c in evaluation.concepts]
    texts = [(name, part.positive, part.negative) for name, part in held]
    own = [a for a in evaluation.kept.answers.values() if not a.row.concept]
    return check_judge(judge, texts, [(evaluation.instructions[a.row.instruction], a.text) for a in own])


def table(evaluation: Evaluation, scores: Scores, unsure: Mapping[str, str]) -> Table:
    """Scores by concept, method and level, for verdicts."""
    usual, rows = usual_nats(evaluation), []
    for answer, concept in answers_by_concept(evaluation):
        own = scores.get((*answer.row.key, concept))
        if own is None:
            continue
        row = answer.row if answer.row.concept else replace(answer.row, concept=concept)
        surprise = answer.proxies.get("nats", math.nan) - usual
        rows.append(Scored(row, *own, harmonic_mean(*own), surprise))
    return Table(rows, unsure)


def content(
    evaluation: Evaluation,
    scores: Scores,
    by: str,
    unsure: Mapping[str, str],
    checks: Sequence[RubricCheck] = (),
    **about: Any,
) -> dict[str, Any]:
    """Everything as JSON; ``by`` is "proxies" or the judge's name."""
    found = table(evaluation, scores, unsure)
    answers = list(evaluation.kept.answers.values())
    result: dict[str, Any] = {
        "saelab_version": __version__,
        "complete": len(answers) == evaluation.total,
        "answers": len(answers),
        "of": evaluation.total,
        "scored_by": by,
        "config": asdict(evaluation.config),
        "sae": evaluation.setting.run.name,
        "hook_name": evaluation.setting.run.hook_name,
        "cannot_tell": dict(unsure),
        "judge_checks": [c.content() for c in checks],
        "classifiers": {name: asdict(c.accuracy) for name, c in evaluation.classifiers.items()},
        "calibration": evaluation.calibration,
        "latents": {name: r.content() for name, r in evaluation.setting.rankings.items()},
        **about,
    }
    if found.scored:
        result |= {
            "means": found.means(),
            "curves": found.curves(),
            "differences": [d.content() for d in found.differences()],
            "texts": text_measures(evaluation, found),
            "examples": examples(evaluation, found),
        }
    return finite(result)


def text_measures(evaluation: Evaluation, found: Table) -> list[dict[str, Any]]:
    """Per method, on the test instructions at the chosen strengths: what needs no judge."""
    by_key = evaluation.kept.answers
    rows = []
    for method in found.methods:
        chosen = [s for s in found.scored if s.row.method == method and s.row.split == "test"]
        chosen = [s for s in chosen if s.row.level == found.chosen[s.row.concept, method]]
        proxies = [by_key[_key(s)].proxies for s in chosen]
        row: dict[str, Any] = {"method": method, "answers": len(chosen)}
        for name in ("repetition", "distinct", "topic", "words"):
            values = [p[name] for p in proxies if name in p]
            row[name] = float(np.mean(values)) if values else None
        rows.append(row)
    return rows


def examples(evaluation: Evaluation, found: Table) -> list[dict[str, Any]]:
    """The best, a middle and the worst test answer of every method and concept, at the chosen strengths."""
    rows = []
    for concept in found.concepts:
        for method in found.methods:
            cell = found.cells["test", concept, method, found.chosen[concept, method]]
            ranked = sorted(cell, key=lambda s: -s.overall)
            places = sorted({0, len(ranked) // 2, len(ranked) - 1}) if ranked else []
            for s in (ranked[place] for place in places[:EXAMPLES]):
                answer = evaluation.kept.answers[_key(s)]
                instruction = evaluation.instructions[s.row.instruction]
                scores = {name: getattr(s, name) for name in ("concept", "instruction", "fluency", "overall")}
                own = {"concept_name": concept, "method": method, "instruction_text": instruction}
                rows.append(own | {"text": answer.text, "strength": answer.strength} | scores)
    return rows


def unsure_proxies(evaluation: Evaluation) -> dict[str, str]:
    """Why the proxies cannot be believed: the classifiers do not tell the concepts."""
    mean = float(np.mean([c.accuracy.auc for c in evaluation.classifiers.values()]))
    if mean >= LEAST_AUC:
        return {}
    return {"concept": f"the concept classifiers reach an AUC of {mean:.2f} ({LEAST_AUC:g} asked)"}


def evaluate_steering(evaluation: Evaluation, judge: KeptAnswers | None = None) -> dict[str, Any]:
    """Write, measure and judge what is missing, and write ``steer_eval.json``, which is readable at any moment.

    Raises UserError where the endpoint fails or no more requests are allowed; what was found until then is kept.
    """
    path = evaluation.folder / STEER_EVAL

    def save(result: dict[str, Any]) -> dict[str, Any]:
        write_json(path, result)
        return result

    def by_proxies(**about: Any) -> dict[str, Any]:
        return save(content(evaluation, proxy_scores(evaluation), "proxies", unsure_proxies(evaluation), **about))

    evaluation.generate(after=by_proxies)
    result = by_proxies()
    if judge is None:
        return result
    wanted = len({q for _, q in judge_questions(evaluation) if not judge.has(q.messages)})
    evaluation.progress("judging", 0, wanted)
    try:
        checks = check(evaluation, judge)
        unsure = {c.rubric: c.reason for c in checks if not c.passed}
        if len(unsure) == len(RUBRICS):  # asking on would cost much and tell nothing
            tested: dict[str, Any] = {"judge": judge.client.model, "requests": judge.sent}
            return save(content(evaluation, proxy_scores(evaluation), "proxies", unsure, checks, **tested))
        scores = judged_scores(evaluation, judge, lambda done, total: evaluation.progress("judging", done, total))
    except UserError as error:
        by_proxies(judge_stopped=str(error))
        raise
    left_out = len(proxy_scores(evaluation)) - len(scores)
    about = {
        "judge": judge.client.model,
        "unreadable": left_out,
        "proxies": result.get("means"),
        "requests": judge.sent,
    }
    return save(content(evaluation, scores, judge.client.model, unsure, checks, **about))


def save_partly(evaluation: Evaluation) -> None:
    """Write what an evaluation has found when it is stopped, if that is anything yet."""
    if evaluation.classifiers and evaluation.kept.answers:
        found = content(evaluation, proxy_scores(evaluation), "proxies", unsure_proxies(evaluation))
        write_json(evaluation.folder / STEER_EVAL, found)


def read_report(path: Path) -> dict[str, Any]:
    """A saved ``steer_eval.json``."""
    with damaged(path, "run saelab steer-eval again", OSError):
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or "scored_by" not in found:
            raise TypeError("it is no evaluation of steering")
        return found


def _key(scored: Scored) -> tuple:
    row = scored.row
    return ("", *row.key[1:]) if row.method == UNSTEERED else row.key

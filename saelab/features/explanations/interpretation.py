"""Automatic interpretation of latents: explain from some windows, score on others, save the result in the run."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saelab.errors import UserError, damaged
from saelab.features.explanations import prompts
from saelab.features.explanations.requests import IN_FLIGHT, Client, KeptAnswers, in_parallel
from saelab.features.explanations.scores import JudgeScore, detection, fuzzing
from saelab.features.index import FeatureIndex
from saelab.features.schema import Example
from saelab.files import write_json
from saelab.layout import EXPLANATIONS

BANDS = ("q75", "q50", "q25", "q00")
HARD = "hard"
SAVE_EVERY = 2.0  # seconds: the file is written whole


class TooFew(UserError):
    """The index holds too few windows of a latent."""


@dataclass(frozen=True)
class InterpretConfig:
    """How many windows the models see."""

    explain_examples: int = 12
    """Windows that the explainer sees: the top ones and, in between, one of each band."""
    score_examples: int = 20
    """Firing windows, and as many silent ones, that the judge sees; fewer where the index holds fewer."""
    shown: int = 5
    """Windows judged in one request."""
    contrast: int = 6
    """Windows that the explainer sees in which the latent is silent, half of them with a token of a strong firing."""
    threshold: float = 0.3
    """Tokens count as active from this share of their window's largest activation on."""
    in_flight: int = IN_FLIGHT
    """Latents that are explained at once."""
    seed: int = 0
    """Seed of the order of the windows, and of the marks that are misplaced for fuzzing."""

    def __post_init__(self) -> None:
        for name in ("explain_examples", "score_examples", "shown", "in_flight"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.contrast < 0:
            raise UserError(f"contrast={self.contrast} must be 0 or more")
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold={self.threshold} is a share of the largest activation, from 0 to below 1")


@dataclass(frozen=True)
class Explanation:
    """What a model said about one (latent, pole), and how well it predicts."""

    latent: int
    pole: int
    text: str
    detection: JudgeScore
    fuzzing: JudgeScore
    explainer: str
    judge: str

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "detection": self.detection.row(), "fuzzing": self.fuzzing.row()}


def interpret(
    index: FeatureIndex,
    latent: int,
    pole: int,
    explainer: Client,
    judge: Client | None = None,
    config: InterpretConfig | None = None,
) -> Explanation:
    """Explain one (latent, pole) and score the explanation on windows the explainer has not seen.

    The explainer also sees windows in which the latent is silent, half of them with a word that it often fires on where
    the index has such. The judge sees others of both sorts; the scores come from firing and silent windows in equal
    numbers. Raises TooFew, a UserError, where the index holds too few windows: at least one to explain from and one of
    each sort to judge.
    """
    config, judge = config or InterpretConfig(), judge or explainer
    shown, firing = _divide(index, latent, pole, config)
    contrast, silent = _silent(index, latent, pole, config)
    if not shown or not firing or not silent:
        raise TooFew(
            f"latent {latent} ({pole:+d}) has {len(shown)} windows to explain and {len(firing)} firing, {len(silent)} "
            "silent ones to score; it fires too rarely or too densely, or the index was built with too few examples"
        )
    answer = explainer.ask(prompts.explain(shown, index.max_activation(latent, pole), config.threshold, contrast))
    text = _explanation(answer)
    return Explanation(
        latent,
        pole,
        text,
        detection(judge, text, firing, silent, config.shown, config.seed),
        fuzzing(judge, text, firing, silent, config.shown, config.seed, config.threshold),
        _name(explainer),
        _name(judge),
    )


def _name(client: Client) -> str:
    return client.client.model if isinstance(client, KeptAnswers) else client.model


def interpret_all(
    index: FeatureIndex,
    latents: Iterable[tuple[int, int]],
    explainer: Client,
    judge: Client | None = None,
    config: InterpretConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Explanation], list[str]]:
    """Interpret many (latent, pole)s, ``config.in_flight`` at once; returns the explanations, and why the others have
    none, both in the order of ``latents``.

    The file is written every few seconds and at the end, and is the same whatever the order of the answers. An endpoint
    that fails stops the run; the explanations made before are saved.
    """
    config, chosen = config or InterpretConfig(), list(latents)

    def work(key: tuple[int, int]) -> Explanation | str:
        latent, pole = key
        if index.latent(latent, pole)["count"] == 0:
            return f"latent {latent} ({pole:+d}) never fires"
        try:
            return interpret(index, latent, pole, explainer, judge, config)
        except TooFew as error:
            return str(error)

    known, made, saved = load(index.run_folder), {}, time.monotonic()
    try:
        for number, result in in_parallel(work, chosen, config.in_flight):
            made[number] = result
            if isinstance(result, Explanation):
                known[result.latent, result.pole] = result.row()
            if time.monotonic() - saved > SAVE_EVERY:
                _write(index.run_folder, known)
                saved = time.monotonic()
            if progress is not None:
                progress(len(made))
    finally:
        if any(isinstance(result, Explanation) for result in made.values()):
            _write(index.run_folder, known)
    ordered = [made[number] for number in sorted(made)]
    return [r for r in ordered if isinstance(r, Explanation)], [r for r in ordered if isinstance(r, str)]


def load(run_folder: Path | str) -> dict[tuple[int, int], dict[str, Any]]:
    """Saved explanations of a run by (latent, pole); empty where none were made."""
    path = Path(run_folder) / EXPLANATIONS
    if not path.is_file():
        return {}
    with damaged(path, "repair or delete it"):
        return {(row["latent"], row["pole"]): row for row in json.loads(path.read_bytes())}


def save(run_folder: Path, explanation: Explanation) -> None:
    """Add or replace one explanation."""
    known = load(run_folder)
    known[explanation.latent, explanation.pole] = explanation.row()
    _write(run_folder, known)


def _write(run_folder: Path, known: dict[tuple[int, int], dict[str, Any]]) -> None:
    write_json(Path(run_folder) / EXPLANATIONS, [known[key] for key in sorted(known)])


def _divide(
    index: FeatureIndex, latent: int, pole: int, config: InterpretConfig
) -> tuple[list[Example], list[Example]]:
    """Windows to explain from (top, and the first of each band) and others to score on, of other tokens."""
    by_kind = {kind: index.examples(latent, pole, kind) for kind in ("top", *BANDS, "random")}
    bands = [by_kind[band][0] for band in BANDS if by_kind[band]]
    top = by_kind["top"]
    keep = max(config.explain_examples - len(bands), 1)
    # A latent that fires on a few contexts leaves half of them for the score.
    keep = min(keep, max(len(top) // 2, 1))
    shown = _distinct([*top[:keep], *bands])[: config.explain_examples]
    rest = [e for kind in (*BANDS, "random", "top") for e in by_kind[kind] if _unseen(e, shown)]
    return shown, _distinct(rest)[: config.score_examples]


def _silent(
    index: FeatureIndex, latent: int, pole: int, config: InterpretConfig
) -> tuple[list[Example], list[Example]]:
    """Silent windows to explain with and others to score on, of other tokens; of each half hard ones, if there are any.

    A judge must have one of either sort at least, so that few windows all go to the judge.
    """
    kinds = [index.examples(latent, pole, kind) for kind in (HARD, "silent")]
    shown = [found[: min(config.contrast // 2, len(found) // 3)] for found in kinds]
    seen = [e for part in shown for e in part]
    rest = [[e for e in found if _unseen(e, seen)] for found in kinds]
    # In turn, so that a short list holds both sorts.
    mixed = [e for pair in itertools.zip_longest(*rest) for e in pair if e is not None]
    return _distinct(seen), _distinct(mixed)[: config.score_examples]


def _unseen(example: Example, shown: list[Example]) -> bool:
    """Whether a window shares no token with those that the explainer sees, and says something else.

    A latent often fires on neighbouring tokens, whose windows are nearly the same text.
    """
    return not any(
        (e.document == example.document and abs(e.row - example.row) < max(len(e.tokens), len(example.tokens)))
        or e.tokens == example.tokens
        for e in shown
    )


def _distinct(examples: list[Example]) -> list[Example]:
    return list({e.row: e for e in examples}.values())


def _explanation(answer: str) -> str:
    """The line after "Explanation:", or the last line of an answer without one."""
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    for line in reversed(lines):
        head, found, tail = line.partition("Explanation:")
        if found and not head.strip("*# "):
            return tail.strip("* ")
    return lines[-1] if lines else ""

"""Automatic interpretation of latents: explain from some windows, score on others, save the result in the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saelab.errors import UserError, damaged
from saelab.features.explanations import prompts
from saelab.features.explanations.client import ChatClient
from saelab.features.explanations.scores import JudgeScore, detection, fuzzing
from saelab.features.index import FeatureIndex
from saelab.features.schema import Example
from saelab.files import write_json
from saelab.layout import EXPLANATIONS

BANDS = ("q75", "q50", "q25", "q00")


@dataclass(frozen=True)
class InterpretConfig:
    """How many windows the models see."""

    explain_examples: int = 12
    """Windows that the explainer sees: the top ones and, in between, one of each band."""
    score_examples: int = 20
    """Firing windows, and as many silent ones, that the judge sees; fewer where the index holds fewer."""
    shown: int = 5
    """Windows judged in one request."""
    threshold: float = 0.3
    """Tokens count as active from this share of their window's largest activation on."""
    seed: int = 0
    """Seed of the order of the windows, and of the marks that are misplaced for fuzzing."""

    def __post_init__(self) -> None:
        for name in ("explain_examples", "score_examples", "shown"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
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
    explainer: ChatClient,
    judge: ChatClient | None = None,
    config: InterpretConfig | None = None,
) -> Explanation:
    """Explain one (latent, pole) and score the explanation on windows the explainer has not seen.

    Raises UserError where the index holds too few windows: at least one to explain from and one of each sort to judge.
    """
    config, judge = config or InterpretConfig(), judge or explainer
    shown, firing = _divide(index, latent, pole, config)
    silent = index.examples(latent, pole, "silent")[: config.score_examples]
    if not shown or not firing or not silent:
        raise UserError(
            f"latent {latent} ({pole:+d}) has {len(shown)} windows to explain and {len(firing)} firing, {len(silent)} "
            "silent ones to score; it fires too rarely or too densely, or the index was built with too few examples"
        )
    answer = explainer.ask(prompts.explain(shown, index.max_activation(latent, pole), config.threshold))
    text = _explanation(answer)
    return Explanation(
        latent,
        pole,
        text,
        detection(judge, text, firing, silent, config.shown, config.seed),
        fuzzing(judge, text, firing, silent, config.shown, config.seed, config.threshold),
        explainer.model,
        judge.model,
    )


def interpret_all(
    index: FeatureIndex,
    latents: Iterable[tuple[int, int]],
    explainer: ChatClient,
    judge: ChatClient | None = None,
    config: InterpretConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Explanation], list[str]]:
    """Interpret many (latent, pole)s, saving after each; returns the explanations, and why the others have none.

    An endpoint that fails stops the run; the explanations made before are saved.
    """
    done: list[Explanation] = []
    skipped: list[str] = []
    for number, (latent, pole) in enumerate(latents, 1):
        if index.latent(latent, pole)["count"] == 0:
            skipped.append(f"latent {latent} ({pole:+d}) never fires")
        else:
            done.append(interpret(index, latent, pole, explainer, judge, config))
            save(index.run_folder, done[-1])
        if progress is not None:
            progress(number)
    return done, skipped


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
    write_json(Path(run_folder) / EXPLANATIONS, [known[key] for key in sorted(known)])


def _divide(
    index: FeatureIndex, latent: int, pole: int, config: InterpretConfig
) -> tuple[list[Example], list[Example]]:
    """Windows to explain from (top, and the first of each band) and others to score on, none in both."""
    by_kind = {kind: index.examples(latent, pole, kind) for kind in ("top", *BANDS, "random")}
    bands = [by_kind[band][0] for band in BANDS if by_kind[band]]
    top = by_kind["top"]
    keep = max(config.explain_examples - len(bands), 1)
    # A latent that fires on a few contexts leaves half of them for the score.
    keep = min(keep, max(len(top) // 2, 1))
    shown = _distinct([*top[:keep], *bands])[: config.explain_examples]
    seen = {e.row for e in shown}
    rest = [e for kind in (*BANDS, "random", "top") for e in by_kind[kind] if e.row not in seen]
    return shown, _distinct(rest)[: config.score_examples]


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

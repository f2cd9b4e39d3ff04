"""Evaluate steering by the answers it gives: write them, a batch at a time, and measure them offline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saelab.errors import UserError, damaged
from saelab.files import write_json
from saelab.steering.choice import norm_at, word_tokens
from saelab.steering.evaluation.answers import Answer, Kept, Row, Steered, batches, generate_rows, prompt_ids
from saelab.steering.evaluation.concepts import Concept
from saelab.steering.evaluation.config import SteerEvalConfig
from saelab.steering.evaluation.methods import METHODS, Setting, Steerer, check_methods
from saelab.steering.evaluation.proxies import (
    Classifier,
    Reader,
    classifier_for,
    contrast_reading,
    distinct,
    topic_similarity,
)
from saelab.steering.evaluation.verdicts import UNSTEERED
from saelab.steering.measure.budget import strengths_at
from saelab.steering.measure.effects import UnsteeredBaseline, repetition
from saelab.steering.neutral import NEUTRAL
from saelab.steering.recipe.model import ModelIdentity

Array = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
ANSWERS, SETTINGS, CALIBRATION, JUDGED = "answers.jsonl", "settings.json", "calibration.json", "judge.jsonl"


@dataclass
class Evaluation:
    """The answers of an evaluation and what was measured of them, in a folder.

    ``generate`` writes what is missing; it may be interrupted at any moment and called again.
    """

    setting: Setting
    concepts: Sequence[Concept]
    known: Sequence[Concept]  # all concepts of the file: what the classifiers must tell the chosen ones from
    instructions: Sequence[str]
    folder: Path
    config: SteerEvalConfig = field(default_factory=SteerEvalConfig)
    progress: Progress = lambda stage, done, total: None

    def __post_init__(self) -> None:
        config = self.config
        check_methods(config.methods, self.setting.recipe is not None)
        if len(self.instructions) < config.instructions:
            raise UserError(
                f"{config.instructions} instructions are asked for, the file has {len(self.instructions)}; lower "
                "--instructions, or give more"
            )
        self.instructions = list(self.instructions)[: config.instructions]
        # UNSTEERED is the origin of every curve and what topics are compared with: it is always written.
        self.methods = list(dict.fromkeys([UNSTEERED, *config.methods]))
        self.halves = {concept.name: concept.halves() for concept in self.concepts}
        if self.setting.recipe is not None:
            self.setting.recipe.model.check(self.setting.model)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        self.kept = Kept(self.folder / ANSWERS)
        self.calibration: dict[str, Any] = _read(self.folder / CALIBRATION)
        self.classifiers: dict[str, Classifier] = {}

    def generate(self, after: Callable[[], object] = lambda: None) -> None:
        """Write and measure every answer that is missing; ``after`` is called after each concept."""
        total = self.total
        self.progress("answers", len(self.kept.answers), total)
        reader = Reader(self.setting.model, self.setting.tokenizer)
        self._train_classifiers(reader)
        unsteered = [self._unsteered(reader, seed) for seed in range(self.config.seeds)]
        for concept in self.concepts:
            for seed, own in enumerate(unsteered):
                self._answers_of(concept, seed, reader, own)
            after()

    @property
    def total(self) -> int:
        """Answers of the whole evaluation."""
        per_seed = self.config.instructions
        count = sum(self._levels(method) for method in self.methods if method != UNSTEERED)
        return self.config.seeds * per_seed * (1 + count * len(self.concepts))

    def _levels(self, method: str) -> int:
        if method == "recipe":
            return 1 if METHODS[method](self.setting, self.concepts[0], 0).fixed else len(self.config.levels)
        if method == "prompt":
            return len(METHODS[method](self.setting, self.concepts[0], 0).systems)
        return len(self.config.levels)

    def _train_classifiers(self, reader: Reader) -> None:
        """One classifier per concept, of the texts that made no direction."""
        read: dict[str, tuple[Array, Array]] = {}
        for number, concept in enumerate(self.known):
            held = self.halves.get(concept.name)
            if held is not None:
                read[concept.name] = (
                    contrast_reading(reader, held[1].positive),
                    contrast_reading(reader, held[1].negative),
                )
            elif concept.positive:  # a few texts of each of the others
                some = contrast_reading(reader, concept.positive[:3])
                read[concept.name] = (some, some[:0])
            self.progress("classifiers", number + 1, len(self.known))
        self.classifiers = {concept.name: classifier_for(concept, read) for concept in self.concepts}

    def _unsteered(self, reader: Reader, seed: int) -> Array:
        """The activations of the unsteered answers ``[instructions, width]``; written where they are missing."""
        rows = [Row("", UNSTEERED, 0, seed, i, self.config.split(i)) for i in range(len(self.instructions))]
        found = self._write([(row, Steered()) for row in rows], seed)
        answers = [self.kept.answers.get(row.key) or found[row.key] for row in rows]
        read = reader.read(self.instructions, [answer.tokens for answer in answers])
        new, alone = [], reader.alone([answer.tokens for answer in answers])
        for row, answer, acts, nats in zip(rows, answers, alone, read.nats):
            if row.key not in self.kept.answers:
                answer.proxies = _of_text(answer, float(nats), 1.0)
                new.append(answer)
            for name, classifier in self.classifiers.items():
                share = float(classifier.scores(acts[None])[0]) if answer.tokens else 0.0
                answer.proxies[f"concept {name}"] = share
        self._keep(new)
        return read.activations

    def _answers_of(self, concept: Concept, seed: int, reader: Reader, unsteered: Array) -> None:
        rows = self._plan(concept, seed)
        if all(row.key in self.kept.answers for row, _ in rows):
            return
        mean = unsteered.mean(0)
        lengths = [len(prompt_ids(self.setting.tokenizer, self.instructions[r.instruction], s.system)) for r, s in rows]
        for batch in batches(rows, lengths, self.config.batch):
            if all(row.key in self.kept.answers for row, _ in batch):
                continue
            answers = list(self._write(batch, seed).values())
            places = [answer.row.instruction for answer in answers]
            read = reader.read([self.instructions[i] for i in places], [answer.tokens for answer in answers])
            similar = topic_similarity(read.activations, unsteered[places], mean)
            alone = reader.alone([answer.tokens for answer in answers])
            concepts = self.classifiers[concept.name].scores(alone)
            for answer, nats, topic, share in zip(answers, read.nats, similar, concepts):
                answer.proxies = _of_text(answer, float(nats), float(topic))
                answer.proxies["concept"] = float(share) if answer.tokens else 0.0
                answer.proxies["words"] = float(_names(answer.text, concept.vocabulary))
            self._keep(answers)

    def _write(self, rows: Sequence[tuple[Row, Steered]], seed: int) -> dict[tuple, Answer]:
        if all(row.key in self.kept.answers for row, _ in rows):
            return {}
        made = generate_rows(
            self.setting.model, self.setting.tokenizer, rows, self.instructions, self.config.generation, seed
        )
        return {answer.row.key: answer for answer in made}

    def _keep(self, answers: Sequence[Answer]) -> None:
        if answers:
            self.kept.add(answers)
            self.progress("answers", len(self.kept.answers), self.total)

    def _plan(self, concept: Concept, seed: int) -> list[tuple[Row, Steered]]:
        """Every row of a concept and a seed, with what is done to it."""
        rows = []
        makers = self.halves[concept.name][0]
        steerers = {m: METHODS[m](self.setting, makers, seed) for m in self.methods if m != UNSTEERED}
        strengths = self._calibrated(concept, seed, steerers)
        for name, steerer in steerers.items():
            for level, steered in enumerate(self._steered(steerer, strengths.get(name))):
                for i in range(len(self.instructions)):
                    rows.append((Row(concept.name, name, level, seed, i, self.config.split(i)), steered))
        return rows

    def _steered(self, steerer: Steerer, strengths: Sequence[float] | None) -> list[Steered]:
        if steerer.make is None:
            return [Steered(system=text) for text in steerer.systems]
        found = []
        for strength in strengths or [1.0]:
            steps = [
                replace(i, where=self.config.where) if not steerer.own_places else i for i in steerer.make(strength)
            ]
            found.append(Steered(interventions=steps, strength=strength))
        return found

    def _calibrated(self, concept: Concept, seed: int, steerers: dict[str, Steerer]) -> dict[str, list[float]]:
        """The strengths of every method that has one, measured once and kept."""
        known = self.calibration.setdefault(f"{concept.name} / {seed}", {})
        missing = {name: s for name, s in steerers.items() if s.make is not None and not s.fixed and name not in known}
        if missing:
            self.progress("calibration", 0, len(missing))
            tokens = word_tokens(self.setting.tokenizer, concept.vocabulary).tolist()
            baseline = UnsteeredBaseline(self.setting.model, NEUTRAL[:3], tokens, tokenizer=self.setting.tokenizer)
            norm = norm_at(self.setting.model, self.setting.run, NEUTRAL[:3], self.setting.tokenizer)
            for group, start in (("recipe", 0.5), ("", 0.15 * norm)):
                names = [name for name in missing if (name == "recipe") == (group == "recipe")]
                self._calibrate(names, missing, baseline, start, known)
            self.progress("calibration", len(missing), len(missing))
            write_json(self.folder / CALIBRATION, self.calibration)
        return {name: [level["strength"] for level in row["levels"]] for name, row in known.items()}

    def _calibrate(
        self, names: Sequence[str], steerers: dict[str, Steerer], baseline: UnsteeredBaseline, start: float, known: dict
    ) -> None:
        if not names:
            return
        # The neutral texts are no generation: damage is that of steering every token, wherever it will act.
        made: list[Any] = [steerers[name].make for name in names]
        makers = [lambda strength, make=make: [replace(i, where="all") for i in make(strength)] for make in made]
        for name in names:
            known[name] = {"about": steerers[name].about, "levels": []}
        for budget in self.config.budgets():
            for name, at in zip(names, strengths_at(baseline, makers, budget, start, unit=self.config.budget_unit)):
                mass = float(at.effects.mass.mean())
                known[name]["levels"].append(
                    {"strength": at.strength, "damage": at.damage, "reached": at.reached, "concept_mass": mass}
                )

    def _check_settings(self) -> None:
        """Refuse a folder that holds the answers of another evaluation."""
        texts = json.dumps([[asdict(c) for c in self.known], self.instructions]).encode()
        settings = {
            "config": asdict(self.config) | {"batch": None},
            "model": ModelIdentity.of(self.setting.model).fingerprint,
            "sae": self.setting.run.fingerprint,
            "concepts": [concept.name for concept in self.concepts],
            "texts": hashlib.sha256(texts).hexdigest(),
            "latents": {name: list(where) for name, where in self.setting.latents.items()},
        }
        settings = json.loads(json.dumps(settings))
        path = self.folder / SETTINGS
        before = _read(path)
        if before and before != settings:
            other = ", ".join(name for name in settings if before.get(name) != settings[name])
            raise UserError(f"{self.folder} holds an evaluation with other settings ({other}); name another folder")
        write_json(path, settings)


def _of_text(answer: Answer, nats: float, topic: float) -> dict[str, float]:
    """What is measured of a text whatever its concept; an empty one has no nats, which JSON cannot hold as NaN."""
    found = {"topic": topic, "repetition": repetition(answer.tokens), "distinct": distinct(answer.tokens)}
    return found if not answer.tokens else found | {"nats": nats}


def _names(text: str, words: Iterable[str]) -> bool:
    from saelab.features.search import words as pattern

    return any(pattern(word).search(text.lower()) for word in words)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with damaged(path, "remove it, or name another folder"):
        return dict(json.loads(path.read_bytes()))

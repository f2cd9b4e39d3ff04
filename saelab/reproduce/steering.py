"""Claims about steering with latents: as far as the difference of means, further than TopK's, one latent both ways.

What is measured is the probability of a concept's words on texts that have nothing to do with it, at the strength at
which steering costs the same KL divergence. Directions and latents are chosen on other texts: the difference of means
and the candidates by every other pair of a concept's contrast texts, the latent by its effect at a small dose. Each
comparison is a difference of logarithms; its interval is over seeds, each of which is a mean over concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from saelab.evaluation.same_model import plain_site
from saelab.reproduce.lab import Lab, Spec
from saelab.reproduce.ledger import Row, above, all_of, attributed, paired, summary
from saelab.runs import Run
from saelab.sae import SAE
from saelab.steering.choice import rank_latents, slope, unit_directions, word_tokens
from saelab.steering.directions import difference_of_means, random_direction
from saelab.steering.evaluation.concepts import Concept, shipped_concepts
from saelab.steering.measure.budget import strengths_at
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.neutral import HELD_OUT, NEUTRAL
from saelab.steering.operations import Add
from saelab.steering.vectors import SteeringVector

BUDGET = 0.3  # nats of KL per token
CONCEPTS = 8  # the first of the shipped ones
OPPOSITES = (("happiness", "sadness"), ("love", "anger"), ("computers", "the past"), ("war", "family"))
MATCHES = float(np.log(0.8))  # a latent matches what it reaches four fifths of
CANDIDATES = 8


@dataclass
class Bench:
    """The language model of a lab, and what was measured on it that does not depend on an SAE."""

    lab: Lab
    concepts: Sequence[Concept] = field(default_factory=lambda: shipped_concepts()[:CONCEPTS])
    texts: Sequence[str] = tuple(HELD_OUT)
    chosen_on: Sequence[str] = tuple(NEUTRAL[:3])

    @cached_property
    def model(self) -> Any:
        return plain_site(self.lab.model, self.lab.cache)[0]

    @property
    def tokenizer(self) -> Any:
        """None where the lab's model has none; then nothing about words can be measured."""
        return getattr(self.lab.model, "tokenizer", None)

    @property
    def hook_name(self) -> str:
        return self.lab.cache.hook_name

    def run(self, sae: SAE) -> Run:
        """An SAE of the lab at its hook point."""
        return Run(sae, self.hook_name, rms_norm=self.lab.cache.manifest.rms_norm)

    def baseline(self, concept: Concept, texts: Sequence[str]) -> UnsteeredBaseline:
        tokens = word_tokens(self.tokenizer, concept.vocabulary).tolist()
        return UnsteeredBaseline(self.model, texts, tokens, tokenizer=self.tokenizer)

    def means(self, concept: Concept, other: Concept | None = None) -> SteeringVector:
        """The difference of the means of a concept's texts, to those of another concept where one is given."""
        own = concept.halves()[0]
        negative = own.negative if other is None else other.halves()[0].positive
        return difference_of_means(self.model, self.hook_name, own.positive, negative, tokenizer=self.tokenizer)

    def at_budget(self, baseline: UnsteeredBaseline, vectors: Sequence[SteeringVector]) -> list[tuple[float, float]]:
        """For each direction the strength, and the logarithm of how often likelier the concept's words are."""
        makers = [lambda s, v=vector: [Add(v, s)] for vector in vectors]
        start = 0.2 * (self.lab.cache.manifest.rms_norm or 1.0)
        found = strengths_at(baseline, makers, BUDGET, start)
        return [(at.strength, float((at.effects.mass.mean() / at.effects.mass_before.mean()).log())) for at in found]

    @cached_property
    def controls(self) -> dict[str, list[float]]:
        """The difference of means and a random direction, per concept."""
        found: dict[str, list[float]] = {"difference_of_means": [], "random": []}
        for number, concept in enumerate(self.concepts):
            vector = self.means(concept)
            reached = self.at_budget(self.baseline(concept, self.texts), [vector, random_direction(vector, number)])
            for values, (_, gain) in zip(found.values(), reached):
                values.append(gain)
        return found

    def latents(self, sae: SAE) -> list[float]:
        """What the latent that is chosen for each concept reaches."""
        run, found = self.run(sae), []
        for concept in self.concepts:
            half = concept.halves()[0]
            ranking = rank_latents(
                self.model, run, half, self.chosen_on, candidates=CANDIDATES, tokenizer=self.tokenizer
            )
            best = ranking.candidates[0]
            vector = SteeringVector.from_latent(run, best.latent, best.pole)
            found.append(self.at_budget(self.baseline(concept, self.texts), [vector])[0][1])
        return found

    def both_ways(self, vector: SteeringVector, pair: tuple[Concept, Concept]) -> tuple[float, float]:
        """How far a direction moves the predictions to the first concept of a pair, and its negative to the second."""
        baselines = [self.baseline(concept, self.texts) for concept in pair]
        moved = []
        for sign, to, other in ((1.0, 0, 1), (-1.0, 1, 0)):
            ((strength, gain),) = self.at_budget(baselines[to], [sign * vector])
            effects = baselines[other].measure(Add(sign * vector, strength))
            moved.append(gain - float((effects.mass.mean() / effects.mass_before.mean()).log()))
        return moved[0], moved[1]

    def axis(self, sae: SAE, pair: tuple[Concept, Concept]) -> SteeringVector:
        """The latent whose direction tells the concepts of a pair apart most, by the slope at dose 0; its sign is that
        of the first concept."""
        slopes: list[Tensor] = [
            slope(self.model, self.hook_name, self.baseline(concept, self.chosen_on)) for concept in pair
        ]
        scores = unit_directions(sae).cpu() @ (slopes[0] - slopes[1])
        latent = int(scores.abs().argmax())
        return SteeringVector.from_latent(self.run(sae), latent, 1 if scores[latent] > 0 else -1)


def against_means(bench: Bench, label: str, specs: Sequence[Spec], paper: str, setting: str) -> Row:
    """A latent of one SAE per seed against the difference of means."""
    claim = "steering with a latent matches or beats the difference of means"
    if bench.tokenizer is None:
        return Row(paper, claim, setting, {}, "not testable here", "needs a language model with its tokenizer")
    gains = [bench.latents(bench.lab.sae(spec)) for spec in specs]
    means, chance = (np.array(bench.controls[name]) for name in ("difference_of_means", "random"))
    gap, over = summary([float(np.mean(g - means)) for g in map(np.array, gains)]), np.mean(gains, axis=0) - means
    measured = {
        "difference": gap,
        "difference_over_concepts": summary(over.tolist()),
        "log_gain": {label: summary([float(np.mean(g)) for g in gains])},
        "log_gain_difference_of_means": float(means.mean()),
        "log_gain_random": float(chance.mean()),
        "concepts": [concept.name for concept in bench.concepts],
    }
    beyond = [{end: d[end] - MATCHES for end in ("low", "high")} for d in (gap, measured["difference_over_concepts"])]
    return Row(
        paper, claim, f"{setting}, {len(bench.concepts)} concepts, KL {BUDGET} nats per token", measured,
        all_of([above(d) for d in beyond]),
        "logarithm of the gain in the probability of a concept's words at equal KL, latent minus difference of means: "
        "the 95 % intervals over seeds and over concepts both lie above ln 0.8; the paper judges answers (MMLU, "
        "HarmBench) of models of 2B parameters and more", shows="difference",
    )  # fmt: skip


def further_than(bench: Bench, a: Sequence[Spec], b: Sequence[Spec], paper: str, claim: str, setting: str) -> Row:
    """Latents of one variant against those of another, seed by seed."""
    if bench.tokenizer is None:
        return Row(paper, claim, setting, {}, "not testable here", "needs a language model with its tokenizer")
    gains = [[float(np.mean(bench.latents(bench.lab.sae(spec)))) for spec in specs] for specs in (a, b)]
    gap = paired(*gains)
    measured = {"difference": gap, "log_gain": {specs[0].label: summary(g) for specs, g in zip((a, b), gains)}}
    measured |= {"log_gain_difference_of_means": float(np.mean(bench.controls["difference_of_means"]))}
    return Row(
        paper, claim, f"{setting}, {len(bench.concepts)} concepts, KL {BUDGET} nats per token", measured, above(gap),
        "logarithm of the gain in the probability of a concept's words at equal KL, of the latent with the largest "
        "effect: whole 95 % interval of the paired difference above zero", shows="difference",
    )  # fmt: skip


def one_latent_both_ways(
    bench: Bench,
    signed: Sequence[Spec],
    plain: Sequence[Spec],
    paper: str,
    setting: str,
    pairs: Sequence[tuple[Concept, Concept]] | None = None,
) -> Row:
    """One signed latent steered to both poles of a pair of opposites, with an unsigned latent negated beside it."""
    claim = "one signed latent steers both ways, to either of two opposite concepts"
    if bench.tokenizer is None:
        return Row(paper, claim, setting, {}, "not testable here", "needs a language model with its tokenizer")
    known = {concept.name: concept for concept in shipped_concepts()}
    pairs = [(known[x], known[y]) for x, y in OPPOSITES] if pairs is None else pairs
    weaker: dict[str, list[float]] = {}
    for specs in (signed, plain):
        rows = [[min(bench.both_ways(bench.axis(bench.lab.sae(spec), pair), pair)) for pair in pairs] for spec in specs]
        weaker[specs[0].label] = [float(np.mean(row)) for row in rows]
    a, b = (weaker[specs[0].label] for specs in (signed, plain))
    own, gap = summary(a), paired(a, b)
    means = float(np.mean([min(bench.both_ways(bench.means(*pair), pair)) for pair in pairs]))
    measured = {"weaker_way": own, "difference": gap, "weaker_way_of": {k: summary(v) for k, v in weaker.items()}}
    measured |= {"weaker_way_difference_of_means": means, "pairs": [f"{x.name} / {y.name}" for x, y in pairs]}
    return Row(
        paper, claim, f"{setting}, {len(pairs)} pairs, KL {BUDGET} nats per token", measured,
        attributed(above(own), above(gap)),
        "how far the logarithm of one concept's probability against the other's moves at equal KL, the weaker of both "
        "ways: above zero with its whole 95 % interval, and above that of a TopK latent that is negated for the way "
        "back, without which it says nothing about signed latents", shows="weaker_way",
    )  # fmt: skip

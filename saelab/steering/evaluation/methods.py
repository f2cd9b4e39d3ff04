"""The ways of steering that an evaluation compares: directions, latents, a recipe, prompting, and nothing.

A method is one function, registered under its name: from a concept to a :class:`Steerer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from saelab.errors import UserError, near_matches
from saelab.runs import Run
from saelab.steering.choice import Ranking, rank_latents
from saelab.steering.directions import difference_of_means, pca, probe, random_direction
from saelab.steering.evaluation.concepts import Concept
from saelab.steering.interventions import Intervention
from saelab.steering.measure.budget import Maker
from saelab.steering.neutral import NEUTRAL
from saelab.steering.operations import Add
from saelab.steering.recipe import Recipe
from saelab.steering.vectors import SteeringVector

# What prompting asks for, from the mildest to the strongest: its strengths.
PROMPTS = (
    "Where it fits, mention {concept} in your answer.",
    "Answer the request, and work {concept} into every sentence of your answer.",
    "Whatever you are asked, write about {concept} and about nothing else.",
)
CANDIDATES = 12  # latents that are measured in the model for each concept


@dataclass(frozen=True)
class Steerer:
    """One method for one concept: interventions that depend on a strength, or wordings of a system prompt."""

    make: Maker | None = None
    systems: tuple[str, ...] = ()
    fixed: bool = False  # ``make`` ignores the strength
    own_places: bool = False  # the interventions say themselves on which tokens they act
    about: str = ""  # which latent, how well a probe separates, and the like


@dataclass(frozen=True, eq=False)
class Setting:
    """What the methods have to work with."""

    model: nn.Module
    tokenizer: Any
    run: Run
    recipe: Recipe | None = None
    latents: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # concept -> latent and pole, where given
    rankings: dict[str, Ranking] = field(default_factory=dict)  # of the concepts so far

    def ranking(self, concept: Concept) -> Ranking:
        """The latents of the SAE by what they do for a concept; measured once."""
        if concept.name not in self.rankings:
            self.rankings[concept.name] = rank_latents(
                self.model, self.run, concept, NEUTRAL[:3], candidates=CANDIDATES, tokenizer=self.tokenizer
            )
        return self.rankings[concept.name]


Method = Callable[[Setting, Concept, int], Steerer]
METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Register a method: a function of the setting, the concept (its texts for making directions) and a seed."""

    def register(function: Method) -> Method:
        METHODS[name] = function
        return function

    return register


def check_methods(names: Sequence[str], recipe: bool) -> None:
    """Refuse unknown methods, a list without any, and a recipe that is missing or that nothing uses."""
    if not names:
        raise UserError(f"name at least one method: {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: {near_matches(name, METHODS)}")
    if len(set(names)) < len(names):
        raise UserError("a method is named twice; name each once")
    if ("recipe" in names) != recipe:
        raise UserError("the method recipe and --recipe FOLDER belong together; give both or neither")


@method("none")
def nothing(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """The model as it is."""
    return Steerer()


@method("prompt")
def prompting(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """The concept asked for in words."""
    return Steerer(systems=tuple(text.format(concept=concept.name) for text in PROMPTS))


@method("latent")
def latent_by_effect(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """The latent named for the concept, or the one with the largest effect at a small dose."""
    if concept.name in setting.latents:
        return _latent(setting, *setting.latents[concept.name])
    best = setting.ranking(concept).best
    return _latent(setting, best.latent, best.pole)


@method("latent-by-input")
def latent_by_input(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """The latent that tells the contrast texts apart best, whatever it writes."""
    found = [c for c in setting.ranking(concept).candidates if c.input_score is not None]
    best = max(found, key=lambda c: c.input_score or 0.0)
    return _latent(setting, best.latent, best.pole)


@method("difference-of-means")
def by_means(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """The difference of the means of the contrast texts."""
    return _vector(_from_texts(difference_of_means, setting, concept))


@method("probe")
def by_probe(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """A logistic regression between the contrast texts."""
    return _vector(_from_texts(probe, setting, concept))


@method("pca")
def by_pca(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """The main axis of the differences of the pairs."""
    n = min(len(concept.positive), len(concept.negative))
    pairs = replace(concept, positive=concept.positive[:n], negative=concept.negative[:n])
    return _vector(_from_texts(pca, setting, pairs))


@method("random")
def at_random(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """A random direction: what damage alone does. Each concept and each seed has its own."""
    like = SteeringVector.from_latent(setting.run, 0)
    draw = seed * 1_000_003 + sum(ord(letter) * 31**i for i, letter in enumerate(concept.name)) % 1_000_003
    return _vector(random_direction(like, draw))


@method("recipe")
def by_recipe(setting: Setting, concept: Concept, seed: int) -> Steerer:
    """A saved recipe; the strengths of what it adds are scaled together, its other operations stay as they are."""
    assert setting.recipe is not None
    steps = list(setting.recipe.interventions)

    def make(factor: float) -> list[Intervention]:
        return [replace(i, strength=i.length * factor) if isinstance(i, Add) else i for i in steps]

    return Steerer(make, fixed=not any(isinstance(i, Add) for i in steps), own_places=True, about=setting.recipe.name)


def _from_texts(make: Callable[..., SteeringVector], setting: Setting, concept: Concept) -> SteeringVector:
    where, tokenizer = setting.run.hook_name_out, setting.tokenizer
    return make(setting.model, where, concept.positive, concept.negative, tokenizer=tokenizer)


def _latent(setting: Setting, latent: int, pole: int) -> Steerer:
    name = f"latent {latent}{'' if pole > 0 else ' −'}"
    return replace(_vector(SteeringVector.from_latent(setting.run, latent, pole)), about=name)


def _vector(vector: SteeringVector) -> Steerer:
    known = {"accuracy": "accuracy {:.2f}", "explained": "explains {:.0%}"}
    about = ", ".join(text.format(vector.origin[name]) for name, text in known.items() if name in vector.origin)
    return Steerer(lambda strength: [Add(vector, strength)], about=about)

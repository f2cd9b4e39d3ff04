"""``python -m saelab.bench.concepts``: which way of choosing a latent steers best, over the shipped concepts.

Every way chooses one latent of an SAE per concept: by searching the feature index for the concept's words, by contrast
texts (input score), by what the latents promote (output score), by the effect at a small dose. A difference of means
and random directions stand beside them. All are added at the strength that costs the same KL divergence on texts that
nothing was chosen on, where the probability of the concept's words is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.errors import UserError
from saelab.features.output_score import output_scores
from saelab.features.search import by_closeness, catalogue, find
from saelab.metrics.intervals import t_interval
from saelab.runs import Run
from saelab.steering.choice import rank_latents, word_tokens
from saelab.steering.directions import difference_of_means, random_direction
from saelab.steering.evaluation.concepts import Concept, pick_concepts, shipped_concepts
from saelab.steering.measure.budget import strengths_at
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.neutral import HELD_OUT, NEUTRAL
from saelab.steering.operations import Add
from saelab.steering.vectors import SteeringVector

WAYS = ("word search", "contrast texts", "output score", "effect", "difference of means", "random direction")


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    run: str | None = None
    """Run folder with a feature index; by default the shipped TopK SAE with 16,384 latents."""
    concepts: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Shipped concept to measure; give the option again for more. All of them by default."""
    budget_kl: float = 0.3
    """Damage of every direction, nats per token."""
    out: Path | None = None
    """JSON file to write; it is written after every concept."""
    json: bool = False
    """Print JSON."""


@dataclass
class Found:
    """One concept: which latent each way chose, and what it did."""

    concept: str
    before: float
    latents: dict[str, str] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=dict)  # probability of the concept's words at the budget
    kl: dict[str, float] = field(default_factory=dict)


def directions(model: Any, run: Run, table: Any, concept: Concept, seed: int) -> tuple[dict[str, SteeringVector], dict]:
    """The direction of every way that finds one, and the names of the latents."""
    texts = concept.halves()[0]
    ranking = rank_latents(model, run, texts, NEUTRAL[:3], candidates=12)
    assert run.index is not None
    written = output_scores(run.index, concept.vocabulary).sort_values("output_score", ascending=False)
    read = max(ranking.candidates, key=lambda c: -1 if c.input_score is None else c.input_score)
    chosen = {"contrast texts": (read.latent, read.pole), "effect": (ranking.best.latent, ranking.best.pole)}
    if written["output_score"].iloc[0] > 0:
        chosen["output score"] = (int(written["latent"].iloc[0]), int(written["pole"].iloc[0]))
    for word in concept.vocabulary:
        hits: Any = by_closeness(find(table, word), word)
        if len(hits):
            chosen["word search"] = (int(hits["latent"].iloc[0]), int(hits["pole"].iloc[0]))
            break
    found = {way: SteeringVector.from_latent(run, *chosen[way]) for way in WAYS if way in chosen}
    found["difference of means"] = difference_of_means(model, run.hook_name_out, texts.positive, texts.negative)
    found["random direction"] = random_direction(found["difference of means"], seed)
    names = {way: f"{latent}{'' if pole > 0 else ' −'}" for way, (latent, pole) in chosen.items()}
    return found, names


def check(run: Run) -> None:
    """Refuse a run without a feature index."""
    if run.index is None:
        raise UserError(f"{run.name} has no feature index, which the search for words needs; run saelab index")


def measure(model: Any, run: Run, concepts: Sequence[Concept], settings: Settings, done: Any = None) -> list[Found]:
    """Measure every concept; ``done`` is called with the results after each."""
    check(run)
    assert run.index is not None
    table, results = catalogue(run.index), []
    rms = run.rms_norm or 1.0
    for number, concept in enumerate(concepts):
        vectors, names = directions(model, run, table, concept, number)
        tokens = word_tokens(model.tokenizer, concept.vocabulary).tolist()
        baseline = UnsteeredBaseline(model, HELD_OUT, tokens)
        makers = [lambda s, v=vector: [Add(v, s)] for vector in vectors.values()]
        at = dict(zip(vectors, strengths_at(baseline, makers, settings.budget_kl, 0.2 * rms)))
        before = float(next(iter(at.values())).effects.mass_before.mean())
        found = Found(concept.name, before, names)
        found.mass = {way: float(a.effects.mass.mean()) for way, a in at.items()}
        found.kl = {way: a.damage for way, a in at.items()}
        results.append(found)
        if done is not None:
            done(results)
    return results


def summary(results: Sequence[Found]) -> list[dict[str, Any]]:
    """Per way: mean probability in per cent, and its difference to the difference of means over concepts; concepts for
    which a way finds nothing count with the probability before."""
    rows = []
    mass = {way: np.array([100 * r.mass.get(way, r.before) for r in results]) for way in WAYS}
    for way in WAYS:
        row: dict[str, Any] = {"way": way, "found": sum(way in r.mass for r in results)}
        row |= {"mean": float(mass[way].mean()), "median": float(np.median(mass[way]))}
        difference = mass[way] - mass["difference of means"]
        if way != "difference of means" and len(results) > 1:
            low, high = t_interval(difference)
            row |= {"difference": float(difference.mean()), "low": low, "high": high}
            row["wins"] = int((difference > 0).sum())
        rows.append(row)
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Load the model, measure, print."""
    from saelab.lm import load_model
    from saelab.lm.unwrapped import plain_model
    from saelab.shipped import checkpoints

    settings = command.options(Settings, "concepts", __doc__, args)
    concepts = pick_concepts(settings.concepts, shipped_concepts())
    run = Run.open(settings.run or checkpoints() / "topk_16384")
    check(run)
    bridge: Any = load_model(run.model_name or "smollm2")
    model: Any = plain_model(bridge) or bridge  # its attention is faster
    model.tokenizer = bridge.tokenizer

    def content(results: Sequence[Found]) -> dict[str, Any]:
        about = {"run": run.name, "budget_kl": settings.budget_kl, "threads": torch.get_num_threads()}
        return about | {"summary": summary(results), "concepts": [asdict(r) for r in results]}

    results = measure(model, run, concepts, settings, lambda found: write_out(settings.out, content(found)))
    if settings.json:
        print(json.dumps(content(results), indent=1))  # noqa: T201
        return
    table = Table("chosen by", "found", "mean %", "median %", "minus difference of means", "wins")
    for row in summary(results):
        interval = f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})" if "low" in row else ""
        numbers = (str(row["found"]), f"{row['mean']:.2f}", f"{row['median']:.2f}", interval, str(row.get("wins", "")))
        table.add_row(row["way"], *numbers)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    command.run(main)

"""``python -m saelab.bench.search``: does a search for a word find the latent that is about it, and does it steer?

For every shipped concept its first word is searched for, in three ways: by letters in labels and tokens, wherever they
stand (version 0.1.0); by whole words in the same places; and by the share of the firing magnitude (`saelab find`). Of
the first hit are measured the share of its firing magnitude on the concept's words, and the probability of these words
on neutral texts when it is added at the strength that costs a given KL divergence. A random direction stands beside
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from rich.console import Console
from rich.table import Table

from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.errors import UserError
from saelab.features.finding import Finder
from saelab.features.search import TEXT_COLUMNS, by_closeness, find
from saelab.runs import Run
from saelab.steering.choice import word_tokens
from saelab.steering.directions import random_direction
from saelab.steering.evaluation.concepts import Concept, pick_concepts, shipped_concepts
from saelab.steering.measure.budget import strengths_at
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.neutral import HELD_OUT
from saelab.steering.operations import Add
from saelab.steering.vectors import SteeringVector

LETTERS, WORDS, SHARE, RANDOM = "letters (0.1.0)", "whole words", "share", "random direction"
WAYS = (LETTERS, WORDS, SHARE, RANDOM)
Hit = tuple[int, int] | None


@dataclass(frozen=True)
class Options:
    """What to measure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders with a feature index."""
    concepts: tuple[str, ...] = ()
    """Shipped concepts; by default all."""
    steer: bool = True
    """Measure the effect of steering too; needs the language model."""
    budget_kl: float = 0.3
    """Damage of every direction, nats per token."""
    out: Path | None = None
    """JSON file to write."""


def first_hits(finder: Finder, concept: Concept) -> dict[str, Hit]:
    """The first (latent, pole) of each way; None where it finds nothing."""
    word, table = concept.vocabulary[0], finder.table
    ways: dict[str, Any] = {
        LETTERS: _by_letters(table, word),
        WORDS: by_closeness(find(table, word), word),
        SHARE: finder.find(word),
    }
    return {
        way: (int(rows["latent"].iloc[0]), int(rows["pole"].iloc[0])) if len(rows) else None
        for way, rows in ways.items()
    }


def _by_letters(table: pd.DataFrame, word: str) -> pd.DataFrame:
    """As 0.1.0 searched: rows with the letters anywhere, by where in the label or the tokens they stand first."""
    texts = [table[f"{name}_lower"] for name in TEXT_COLUMNS.values()]
    hit = np.any([text.str.contains(word, regex=False) for text in texts], axis=0)
    rows: Any = table[hit]
    places = [rows[f"{name}_lower"].str.find(word).to_numpy() for name in ("label", "explanation", "top_tokens")]
    nearest = np.min([np.where(place < 0, 1 << 20, place) for place in places], axis=0)
    return rows.iloc[np.lexsort((-rows["telling"].to_numpy(), nearest))]


def share_on(finder: Finder, concept: Concept, hit: Hit) -> float:
    """Share of a hit's firing magnitude on the concept's words; 0 without one."""
    if hit is None:
        return 0.0
    row = np.flatnonzero((finder.table["latent"] == hit[0]) & (finder.table["pole"] == hit[1]))[0]
    return float(min(sum(finder.words.share(word)[row] for word in concept.vocabulary), 1.0))


def steered(model: Any, run: Run, concept: Concept, hits: dict[str, Hit], budget: float, seed: int) -> dict[str, float]:
    """Probability of the concept's words, in per cent, before and with the direction of each way."""
    tokens = word_tokens(model.tokenizer, concept.vocabulary).tolist()
    baseline = UnsteeredBaseline(model, HELD_OUT, tokens)
    vectors = {way: SteeringVector.from_latent(run, *hit) for way, hit in hits.items() if hit is not None}
    some = next(iter(vectors.values()), None) or SteeringVector.from_latent(run, 0, 1)
    vectors[RANDOM] = random_direction(some, seed)
    makers = [lambda s, v=vector: [Add(v, s)] for vector in vectors.values()]
    at = dict(zip(vectors, strengths_at(baseline, makers, budget, 0.2 * (run.rms_norm or 1.0))))
    before = 100 * float(next(iter(at.values())).effects.mass_before.mean())
    found = {way: 100 * float(a.effects.mass.mean()) for way, a in at.items()}
    return {"before": before, **{way: found.get(way, before) for way in WAYS}}


def measure(run: Run, concepts: Sequence[Concept], model: Any, budget: float) -> list[dict[str, Any]]:
    """One row per concept."""
    if run.index is None:
        raise UserError(f"{run.name} has no feature index; make one with `saelab index`")
    finder, rows = Finder(run.index), []
    for number, concept in enumerate(concepts):
        hits = first_hits(finder, concept)
        row: dict[str, Any] = {"concept": concept.name, "hits": hits}
        row["share"] = {way: share_on(finder, concept, hit) for way, hit in hits.items()}
        if model is not None:
            row["mass"] = steered(model, run, concept, hits, budget, number)
        rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over concepts; ``raises`` is how many concepts a way raises more than the random direction does."""
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        found[way] = {}
        if way != RANDOM:
            found[way]["found"] = sum(row["hits"][way] is not None for row in rows)
            found[way]["share"] = float(np.mean([row["share"][way] for row in rows]))
        if "mass" in rows[0]:
            found[way]["mass_percent"] = float(np.mean([row["mass"][way] for row in rows]))
            found[way]["before_percent"] = float(np.mean([row["mass"]["before"] for row in rows]))
            found[way]["raises"] = sum(
                row["mass"][way] > max(row["mass"][RANDOM], row["mass"]["before"]) for row in rows
            )
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = command.options(Options, "search", __doc__, args)
    concepts, model, found = pick_concepts(options.concepts, shipped_concepts()), None, {}
    for path in options.runs:
        run = Run.open(path)
        if options.steer and model is None:
            from saelab.lm import load_model
            from saelab.lm.unwrapped import plain_model

            bridge: Any = load_model(run.model_name or "smollm2")
            model = plain_model(bridge) or bridge  # its attention is faster
            model.tokenizer = bridge.tokenizer
        rows = measure(run, concepts, model, options.budget_kl)
        found[str(path)] = {"summary": summary(rows), "concepts": rows}
        write_out(options.out, found)
        table = Table("first hit by", *found[str(path)]["summary"][SHARE], title=str(path))
        for way, row in found[str(path)]["summary"].items():
            table.add_row(
                way, *(f"{row[name]:.3g}" if name in row else "" for name in found[str(path)]["summary"][SHARE])
            )
        Console(highlight=False).print(table)


if __name__ == "__main__":
    command.run(main)

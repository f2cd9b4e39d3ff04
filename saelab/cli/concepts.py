"""``--concept``: the latent that steers towards a concept, and the table that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from saelab.cli.console import console, out
from saelab.runs import Run
from saelab.steering.choice import Ranking, rank_latents
from saelab.steering.evaluation.concepts import Concept, find_concept, read_concepts


def read_concept(text: str, file: Path | None) -> Concept:
    """The concept of this name in a file, or the shipped one, or one of the words in the text."""
    return find_concept(text, None if file is None else read_concepts(file))


def choose_latent(run: Run, model: Any, concept: Concept) -> Ranking:
    """Rank the SAE's latents by what they do for the concept, and say which one is chosen and why."""
    ranking = rank_latents(model, run, concept)
    _ = ranking.best
    if not concept.positive:
        console.print(
            f"note: {concept.name} is no known concept, so its words alone are used, without contrast texts; "
            "--concepts FILE gives concepts of your own",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"chose {ranking.reason}", markup=False, soft_wrap=True)
    return ranking


def show_ranking(ranking: Ranking, rows: int = 8) -> None:
    """The best candidates and their scores."""
    table = Table("latent", "effect", "times", "KL", "input score", "output score", "promotes")
    for c in ranking.candidates[:rows]:
        scores = ["" if score is None else f"{score:.2f}" for score in (c.input_score, c.output_score)]
        name = f"{c.latent}{'' if c.pole > 0 else ' −'}"
        table.add_row(name, f"{c.effect:.2f}", f"{c.times:.3g}", f"{c.kl:.3g}", *scores, Text(" ".join(c.promotes)))
    table.add_row("random", f"{max(ranking.controls):.2f}", "", "", "", "", f"the best of {len(ranking.controls)}")
    out.print(table)

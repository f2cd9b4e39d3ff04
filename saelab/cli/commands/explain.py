"""``saelab explain``: describe latents with a language model behind an endpoint, and score the descriptions."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab.cli.console import console, counting, out, parse, part, print_json, with_local_run
from saelab.cli.opening import print_notes
from saelab.errors import UserError
from saelab.features import FeatureIndex
from saelab.features.explanations import ChatClient, Explanation, InterpretConfig, interpret_all, load
from saelab.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Which latents, and who explains them."""

    run: tyro.conf.Positional[Path]
    """Run folder with a feature index; explanations.json is written into it."""
    endpoint: str
    """Address of an OpenAI-compatible server up to /v1, e.g. http://localhost:8000/v1."""
    model: str
    """Model that explains, as the server calls it."""
    judge: str | None = None
    """Model that judges; by default the one that explains."""
    latents: tuple[int, ...] = ()
    """Latents to explain; by default the first ones in the index that fire and have no explanation yet."""
    count: int = 10
    """Number of latents to explain if none are named; each pole of a signed latent counts as one."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; a local server needs none."""
    json: bool = False
    """Print the explanations as JSON on stdout."""


# The settings come after ours in the list of fields, so they are the first base.
ExplainOptions = dataclasses.make_dataclass("ExplainOptions", [], bases=(InterpretConfig, Options), frozen=True)


def main(args: Sequence[str]) -> None:
    """Explain latents one by one; each is saved when it is done."""
    options = parse(
        ExplainOptions, "explain", args, "Describe latents with a language model, and score the descriptions."
    )
    options = with_local_run(options)
    config = part(InterpretConfig, options)
    index = FeatureIndex(options.run)
    with contextlib.suppress(UserError):  # an index can be explained without the weights beside it
        print_notes(Run.open(options.run).notes)
    key = os.environ.get(options.key_variable)
    explainer = ChatClient(options.endpoint, options.model, key)
    judge = ChatClient(options.endpoint, options.judge or options.model, key)
    if options.count < 1:
        raise UserError(f"count={options.count} must be at least 1")
    chosen = choose(index, options.latents, options.count)
    with counting("explain") as progress:
        done, skipped = interpret_all(
            index, chosen, explainer, judge, config, lambda number: progress(number, len(chosen))
        )
    for reason in skipped:
        console.print(f"skipped: {reason}", markup=False)
    if options.json:
        print_json([explanation.row() for explanation in done])
    else:
        show(done)


def choose(index: FeatureIndex, latents: Sequence[int], count: int) -> list[tuple[int, int]]:
    """The (latent, pole)s to explain: those named, or the next ones that fire and are not explained."""
    table, known = index.table(), load(index.run_folder)
    if latents:
        if wrong := [latent for latent in latents if not 0 <= latent < index.d_sae]:
            raise UserError(f"latent {wrong[0]} is outside 0..{index.d_sae - 1}")
        return [(latent, pole) for latent in latents for pole in index.poles]
    rows = zip(table["latent"].to_list(), table["pole"].to_list(), table["count"].to_list())
    return [(latent, pole) for latent, pole, fired in rows if fired and (latent, pole) not in known][:count]


def show(done: list[Explanation]) -> None:
    """One line per explanation, with the accuracy that guessing reaches."""
    for e in done:
        found, marks = e.detection, e.fuzzing
        out.print(f"{e.latent:>6}{'+' if e.pole > 0 else '-'}  {e.text}", markup=False)
        out.print(
            f"         detection {found.accuracy:.2f} (balanced {found.balanced_accuracy:.2f}), fuzzing "
            f"{marks.accuracy:.2f} (balanced {marks.balanced_accuracy:.2f}); answering no to everything reaches "
            f"{found.guess_nothing:.2f}, {found.unanswered + marks.unanswered} unanswered"
        )

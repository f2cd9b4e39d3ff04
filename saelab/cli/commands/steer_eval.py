"""``saelab steer-eval``: compare ways of steering by the answers they give."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Column, Table
from rich.text import Text

from saelab.cli.console import console, out, output_folder, parse, part, print_json, stages
from saelab.cli.models import ModelOptions, open_model
from saelab.cli.opening import open_run
from saelab.cli.placement import computing_device
from saelab.errors import UserError
from saelab.features.explanations import ChatClient
from saelab.features.explanations.requests import KeptAnswers
from saelab.files import replace
from saelab.layout import STEER_EVAL, STEER_REPORT
from saelab.lm.sites import check_replaceable, locate
from saelab.lm.tokens import tokenizer_of
from saelab.lm.unwrapped import plain_model
from saelab.runs.language_model import model_record
from saelab.steering import Recipe
from saelab.steering.evaluation.concepts import (
    Concept,
    pick_concepts,
    read_concepts,
    read_instructions,
    shipped_concepts,
    shipped_instructions,
)
from saelab.steering.evaluation.config import SteerEvalConfig
from saelab.steering.evaluation.evaluate import JUDGED, SETTINGS, Evaluation
from saelab.steering.evaluation.methods import Setting, check_methods
from saelab.steering.evaluation.report import evaluate_steering
from saelab.viz.steer_eval import difference_rows, mean_rows, remarks, report_page

FEW = 5  # concepts by default


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """What to compare, who judges, and where it goes."""

    run: tyro.conf.Positional[str]
    """Run folder, or an SAE of another tool; its hook point is where all directions are added."""
    out: Path
    """Folder for answers.jsonl, steer_eval.json and report.html; an evaluation that was interrupted goes on in it."""
    concept: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Concept to steer towards; give the option again for more. By default the first five of the file."""
    concepts: Path | None = None
    """JSON file of concepts, each with name, positive and negative texts and words; by default the shipped thirty."""
    instruction_file: Path | None = None
    """Text file with one instruction per line; by default the shipped fifty."""
    latent: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Latent for a concept, as NAME=12 or NAME=-12 for its negative pole; by default the one with most effect."""
    recipe: Path | None = None
    """Recipe to compare with (method recipe)."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server up to /v1, whose model judges; without one the scores are proxies."""
    judge: str | None = None
    """Model that judges, as the server calls it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; a local server needs none."""
    max_requests: int | None = None
    """Requests that may be sent to the judge in this call; ratings are kept, and the next call goes on."""
    timeout: float = 120.0
    """Seconds to wait for one rating."""
    hook: str | None = None
    """Hook point of the SAE; by default the one that its files record."""
    overwrite: bool = False
    """Empty the folder first."""
    json: bool = False
    """Print the result as JSON on stdout."""


# Fields of later bases come first, so the positional argument is that of the last one.
SteerEvalOptions = dataclasses.make_dataclass(
    "SteerEvalOptions", [], bases=(SteerEvalConfig, ModelOptions, OwnOptions), frozen=True
)


def main(args: Sequence[str]) -> None:
    """Evaluate, write the report, print the tables."""
    about = "Compare ways of steering: does the concept come through, is the request answered, is the text fluent?"
    options: Any = parse(SteerEvalOptions, "steer-eval", args, about)
    config = part(SteerEvalConfig, options)
    known, concepts, instructions = texts(options)
    check_methods(config.methods, options.recipe is not None)
    latents = dict(named_latent(text, concepts) for text in options.latent)
    client = judge_client(options)
    recipe = None if options.recipe is None else Recipe.load(options.recipe)
    device = computing_device(options.device)
    run = open_run(options.run, options.hook or "")
    for latent, _ in latents.values():
        run.check_latent(latent)
    run.sae.to(device)
    bridge = open_model(options, model_record(run), f"the SAE {options.run}")
    model, tokenizer = fastest(bridge, run.hook_name, run.hook_name_out), tokenizer_of(bridge)
    setting = Setting(model, tokenizer, run, recipe, latents)
    inputs = [options.run, options.recipe or "", options.concepts or "", options.instruction_file or ""]
    folder = output_folder(options.out, options.overwrite, not options.overwrite, (SETTINGS, STEER_EVAL), inputs)
    with folder, stages() as progress:
        evaluation = Evaluation(setting, concepts, known, instructions, options.out, config, progress)
        judge = None if client is None else KeptAnswers(client, options.out / JUDGED, options.max_requests)
        result = evaluate_steering(evaluation, judge)
        page = report_page(result, f"Steering, {run.name}")
        replace(options.out / STEER_REPORT, lambda partial: partial.write_text(page, encoding="utf-8"))
    if options.json:
        print_json(result)
    else:
        show(result)
        out.print(f"saved to {options.out / STEER_EVAL} and {options.out / STEER_REPORT}", markup=False, soft_wrap=True)


def texts(options: Any) -> tuple[list[Concept], list[Concept], list[str]]:
    """All concepts, the chosen ones, and the instructions."""
    known = shipped_concepts() if options.concepts is None else read_concepts(options.concepts)
    concepts = pick_concepts(options.concept, known) if options.concept else known[:FEW]
    file = options.instruction_file
    return known, concepts, shipped_instructions() if file is None else read_instructions(file)


def named_latent(text: str, concepts: Sequence[Concept]) -> tuple[str, tuple[int, int]]:
    """``NAME=12`` as the concept's name, the latent and the pole."""
    name, _, number = text.rpartition("=")
    digits = number.strip().removeprefix("-")
    if not name or not digits.isdecimal():
        raise UserError(f"--latent {text} is not NAME=NUMBER, as in --latent 'the sea=12'")
    (concept,) = pick_concepts([name.strip()], concepts)
    return concept.name, (int(digits), -1 if number.strip().startswith("-") else 1)


def judge_client(options: Any) -> ChatClient | None:
    """The client of the endpoint; None where none is named."""
    if (options.endpoint is None) != (options.judge is None):
        raise UserError("--endpoint ADDRESS and --judge MODEL belong together; give both or neither")
    if options.endpoint is None:
        if options.max_requests is not None:
            raise UserError("--max-requests limits what is asked of --endpoint; give one, or leave it out")
        return None
    if not options.timeout > 0:
        raise UserError(f"timeout={options.timeout} must be above 0 seconds")
    key = os.environ.get(options.key_variable)
    # A rating is one digit; a model that explains itself first has room to.
    return ChatClient(options.endpoint, options.judge, key, timeout=options.timeout, max_tokens=256)


def fastest(bridge: Any, *hook_names: str) -> Any:
    """The plain model over the bridge's tensors, whose attention is faster, where it has the hook points."""
    plain = plain_model(bridge) if hasattr(bridge, "original_model") else None
    if plain is None:
        return bridge
    try:
        for name in hook_names:
            check_replaceable(locate(plain, name))
    except UserError:
        return bridge
    return plain


def show(result: dict[str, Any]) -> None:
    """Remarks, scores, differences, one example of each method."""
    for line in remarks(result):
        console.print(line, markup=False, soft_wrap=True)
    for title, rows in (("Scores, 0 to 2", mean_rows(result)), ("Differences", difference_rows(result))):
        if rows:
            # Names of methods are cut in a narrow console otherwise, and two may have one beginning.
            table = Table(*(Column(name, overflow="fold") for name in rows[0]), title=title)
            for row in rows:
                table.add_row(*row.values())
            out.print(table)
    seen = set()
    for example in result.get("examples", []):
        if example["method"] not in seen:
            seen.add(example["method"])
            head = f"\n{example['method']}, {example['concept_name']}: {example['instruction_text']}"
            out.print(Text(head, style="bold"))
            out.print(Text(f"  {example['text']}"))

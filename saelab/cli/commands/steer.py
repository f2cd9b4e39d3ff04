"""``saelab steer``: continue prompts while one latent is steered, or with a saved recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro
from rich.table import Table
from rich.text import Text

from saelab.cli.calibrating import calibrated
from saelab.cli.chatting import as_text, continuations, converse, passages, turns
from saelab.cli.comparing import compared, show_compared
from saelab.cli.concepts import choose_latent, read_concept, show_ranking
from saelab.cli.console import out, parse, print_json
from saelab.cli.models import ModelOptions, open_model
from saelab.cli.opening import open_run
from saelab.cli.placement import computing_device, follows, join
from saelab.errors import UserError
from saelab.layout import RECIPE
from saelab.runs import Run
from saelab.runs.language_model import model_record
from saelab.steering import (
    OPERATIONS,
    Add,
    Intervention,
    LatentFires,
    Recipe,
    Sampling,
    Schedule,
    SteeringVector,
    VectorIntervention,
    at_layers,
    attribute_logits,
)
from saelab.steering.layers import parse_layers
from saelab.steering.measure.silent import explained
from saelab.steering.recipe import check_free, check_parent, export_gguf
from saelab.steering.vectors import Strength, parse_strength, pole_sign


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """What to steer with, and what to write."""

    run: tyro.conf.Positional[str]
    """Run folder, an SAE of another tool (a file, a folder or a hub id such as hf://org/repo/path), or the folder of a
    recipe."""
    latent: int | None = None
    """Latent to steer with (not with a recipe)."""
    pole: str = "+"
    """Which pole of the latent: + or -."""
    concept: str | None = None
    """Choose the latent that steers towards this: the name of a shipped concept (sea, music, war ...), or words with
    commas between them. Candidates are measured in the language model; without --prompt the best ones are listed."""
    concepts: Path | None = None
    """JSON file of concepts, each with name, positive and negative texts and words, in which --concept is looked up."""
    operation: str = "add"
    """What to do; options_class() completes choices and help from the registered operations."""
    strength: str | None = None
    """The operation's number; options_class() completes the help."""
    where: Literal["all", "prompt", "generated", "answer", "instruction"] = "all"
    """On which tokens to act; in a chat also the answers (of earlier turns too) or the user's messages alone."""
    when_latent: int | None = None
    """Act only on tokens where this latent of the SAE fires above --when-above."""
    when_above: str | None = None
    """Threshold of --when-latent: an activation, or 0.5max of the latent's largest; 0 by default."""
    when_pole: str = "+"
    """Which pole of --when-latent: + or -."""
    schedule: str | None = None
    """Weight of the change at each generated token, as TOKEN:WEIGHT pairs: 0:1,20:0 fades out over twenty tokens. The
    prompt has the first weight."""
    layers: str | None = None
    """Steer at these blocks (4,6,8 or 4-8, or all) instead of the SAE's own; for add, project-out and cap."""
    budget_kl: float | None = None
    """Damage that --strength auto may cause: mean KL divergence per token, in nats; 0.3 by default."""
    hook: str | None = None
    """Hook point of the SAE; by default the one that its files record."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Text to continue; give the option again for more prompts."""
    chat: bool = False
    """Ask each prompt as a user's message in the model's chat template. Without --prompt the messages of one chat are
    read from the standard input, a line each, and answered as they come."""
    system: str | None = None
    """System prompt of --chat."""
    turns: bool = False
    """With --chat: the prompts are the successive messages of one chat."""
    max_new_tokens: int = 40
    """Tokens to generate per prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    compare: bool = False
    """Also continue each prompt without steering, and with random directions that do as much damage."""
    attribute: bool = False
    """Split the change of each steered token's logit (first prompt) into latents and error term."""
    save: Path | None = None
    """Write the intervention as a recipe into this folder."""
    overwrite: bool = False
    """Replace an existing recipe."""
    gguf: Path | None = None
    """Write the vector as a llama.cpp control vector into this file."""
    json: bool = False
    """Print one JSON document on stdout."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions, OwnOptions):
    """What to steer, with what, and what to write."""


def options_class() -> type[Options]:
    """The options, with all registered operations."""
    summaries = " ".join(f"{name}: {cls.summary()}" for name, cls in OPERATIONS.items())
    numbers = ", ".join(f"{name}: {cls.amount.title}" for name, cls in OPERATIONS.items() if cls.amount)
    strength = (
        f"The operation's number ({numbers}). A strength or an activation may have a unit: 0.8max (of the latent's "
        "largest activation), 0.5norm (of the activations' norm), 1raw (of the vector's own length). auto, the default "
        "of add, finds the largest strength whose damage stays within --budget-kl, on the prompts or, without any, on "
        "five sentences. A change of answers, of generated tokens or by --schedule is measured on what the model "
        "writes after them. The default of other operations is 1max where units are possible."
    )
    fields: list[Any] = [
        ("operation", Annotated[Literal[tuple(OPERATIONS)], tyro.conf.arg(help=f"What to do. {summaries}")], "add"),
        ("strength", Annotated[str | None, tyro.conf.arg(help=strength)], None),
    ]
    return dataclasses.make_dataclass("SteerOptions", fields, bases=(Options,), frozen=True)


def main(args: Sequence[str]) -> None:
    """Load, steer, show."""
    options = parse(options_class(), "steer", args, "Steer a language model with a latent or a recipe.")
    asked = (options.prompt, options.chat, options.save, options.gguf, options.concept)
    if not any(asked):
        raise UserError('nothing to do: give --prompt "text", --chat, --concept, --save RECIPE or --gguf FILE')
    check_outputs(options)
    device = computing_device(options.device)
    options = joined(options, device)
    if (Path(options.run) / RECIPE).is_file():
        check_recipe(options)
        run, concept, recipe = None, None, Recipe.load(options.run)
        # The recipe checks the model itself: its architecture and sizes too.
        anyhow = dataclasses.replace(options, any_weights=True)
        model = open_model(anyhow, recipe.model.record, f"the recipe {options.run}")
    else:
        run, recipe = open_run(options.run, options.hook or ""), None
        check(options, run)
        concept = None if options.concept is None else read_concept(options.concept, options.concepts)
        run.sae.to(device)
        model = open_model(options, model_record(run), f"the SAE {options.run}")
    prompts = [as_text(options, model, prompt) for prompt in options.prompt] if options.chat else options.prompt
    ranking = None
    if concept is not None and run is not None:
        ranking = choose_latent(run, model, concept)
        options = dataclasses.replace(options, latent=ranking.best.latent, pole=str(ranking.best.pole))
    if recipe is None:
        assert run is not None
        recipe = Recipe.of(model, interventions(options, run, model, options.prompt), name=f"latent {options.latent}")
    result: dict[str, Any] = {"model": recipe.model.name, "interventions": recipe.settings()}
    if options.chat and not options.prompt:
        recipe.model.check(model, options.any_weights)
        result["messages"] = converse(options, recipe.interventions, model, silent=options.json)
    else:
        result |= texts(options, recipe, model)
        result |= without_effect(options, recipe, model, result)
    if ranking is not None:
        result["choice"] = ranking.content()
    if options.attribute and run is not None:
        result["attribution"] = attributed(options, recipe, run, model, prompts[0])
    if options.save is not None:
        recipe.save(options.save, options.overwrite)
    if options.gguf is not None:
        export_gguf(recipe, options.gguf)
    if options.json:
        print_json(result)
        return
    if ranking is not None:
        show_ranking(ranking)
    show(options, result)


def joined(options: Options, device: Any) -> Options:
    """The options for this process, where several divide the model."""
    join(options.tensor_parallel, device)
    if options.tensor_parallel and options.chat and not options.prompt:
        raise UserError("several processes cannot read what is typed; give the messages with --prompt and --turns")
    return dataclasses.replace(options, save=None, gguf=None) if follows() else options


def check_outputs(options: Options) -> None:
    """Refuse outputs that cannot be written, before anything is loaded."""
    if not options.prompt and (options.attribute or options.compare):
        raise UserError('--attribute and --compare need a text to continue: give --prompt "text"')
    if not options.chat and (options.turns or options.system is not None):
        raise UserError("--system and --turns belong to a chat; add --chat")
    if options.turns and not options.prompt:
        raise UserError('--turns needs the messages: give --prompt "text" for each, or leave it out to type them')
    if options.chat and options.attribute:
        raise UserError("--attribute splits the logits of a plain text; leave out --chat")
    if options.budget_kl is not None and not is_auto(options):
        raise UserError("--budget-kl limits the damage of --strength auto; add that, or leave out --budget-kl")
    Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    if options.save is not None:
        check_free(options.save, options.overwrite)
    if options.gguf is not None:
        if options.gguf.is_dir():
            raise UserError(f"{options.gguf} is a folder; --gguf names a file")
        check_parent(options.gguf)


def check_recipe(options: Options) -> None:
    """Refuse options that the recipe already sets, instead of ignoring them."""
    limits = ("when_latent", "when_above", "when_pole", "schedule", "layers")
    for name in ("latent", "pole", "concept", "operation", "strength", "where", "hook", *limits):
        if getattr(options, name) != getattr(Options, name):
            shown = name.replace("_", "-")
            raise UserError(f"a recipe has its own {shown}; leave out --{shown}")
    if options.attribute:
        raise UserError("--attribute needs the SAE; steer from a run folder instead of a recipe")


def check(options: Options, run: Run) -> None:
    """Check the options that do not need the language model."""
    if (options.latent is None) == (options.concept is None):
        raise UserError('name the latent to steer with, --latent 12, or what to steer towards, --concept "sea"')
    if options.concepts is not None and options.concept is None:
        raise UserError("--concepts is the file in which --concept is looked up; give --concept NAME")
    run.check_latent(options.latent or 0)
    _ = run.hook_name  # refuses where nothing says which
    pole_sign(options.pole)
    if options.when_latent is None and options.when_above is not None:
        raise UserError("--when-above is the threshold of --when-latent; name the latent")
    if options.layers is not None:
        parse_layers(options.layers)
    if not is_auto(options):
        make(options, run, strength_of(options))
    elif options.operation != Add.operation:
        raise UserError("--strength auto works with --operation add only")


def is_auto(options: Options) -> bool:
    """Whether the strength is to be calibrated: it was asked for, or is the default of adding a direction."""
    return options.strength == "auto" or (options.strength is None and options.operation == Add.operation)


def strength_of(options: Options) -> Strength | None:
    """The number given to the operation, or its default; None for an operation without one."""
    amount = OPERATIONS[options.operation].amount
    if options.strength is not None:
        parse_strength(options.strength)
        return options.strength
    if amount is None:
        return None
    return f"{amount.default:g}max" if amount.units else amount.default


def make(options: Options, run: Run, strength: Strength | None) -> Intervention:
    """The intervention that the options describe, at the SAE's own layer."""
    operation, pole = OPERATIONS[options.operation], pole_sign(options.pole)
    made = operation.on_latent(run, options.latent or 0, strength, pole=pole, where=options.where)
    if options.schedule is not None:
        made = dataclasses.replace(made, schedule=Schedule.parse(options.schedule))
    if options.when_latent is not None:
        condition = LatentFires(run, options.when_latent, options.when_above or 0.0, pole_sign(options.when_pole))
        made = dataclasses.replace(made, when=condition)
    return made


def placed(options: Options, made: Intervention, model: Any) -> list[Intervention]:
    """The intervention at every layer that was asked for."""
    if options.layers is None:
        return [made]
    return [*at_layers(model, cast(VectorIntervention, made), parse_layers(options.layers))]


def interventions(options: Options, run: Run, model: Any, prompts: Sequence[str]) -> list[Intervention]:
    """The interventions; with --strength auto their strength is calibrated on the prompts."""
    if not is_auto(options):
        return placed(options, make(options, run, strength_of(options)), model)
    vector = SteeringVector.from_latent(run, options.latent or 0, pole_sign(options.pole))
    return calibrated(options, model, vector, prompts, lambda s: placed(options, make(options, run, repr(s)), model))


def texts(options: Options, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Each prompt's continuations, or the chat that they make."""
    recipe.model.check(model, options.any_weights)
    steps = recipe.interventions
    if options.turns:
        found: dict[str, Any] = {"messages": turns(options, steps, model, options.prompt)}
    else:
        written = continuations(options, steps, model, options.prompt)
        found = {"texts": [{"prompt": prompt, "steered": text} for prompt, text in zip(options.prompt, written)]}
        if options.chat:
            for row in found["texts"]:
                row["read"] = as_text(options, model, row["prompt"])
    return compared(options, steps, model, found) if options.compare else found


def without_effect(options: Options, recipe: Recipe, model: Any, result: dict[str, Any]) -> dict[str, Any]:
    """What of the steering did nothing on the texts, and why; empty where all of it did something."""
    lines = explained(model, recipe.interventions, passages(options, model, result)) if options.prompt else []
    return {"without_effect": lines} if lines else {}


def attributed(options: Options, recipe: Recipe, run: Run, model: Any, prompt: str) -> list[dict[str, Any]]:
    """Every steered token of one prompt, its logit's change split into parts."""
    rows = attribute_logits(model, prompt, recipe.interventions, run, max_new_tokens=options.max_new_tokens)
    return [dataclasses.asdict(row) | {"change": row.change} for row in rows]


def show(options: Options, result: dict[str, Any]) -> None:
    """The settings, the texts side by side, the attribution, the files written."""
    for entry in result["interventions"]:
        out.print(
            ", ".join(f"{key} {value}" for key, value in entry.items() if value not in (None, "")),
            style="dim",
            markup=False,
        )
    if options.prompt:  # what is typed is answered as it comes
        show_compared(result)
    for line in result.get("without_effect", []):
        out.print(Text(f"\n{line}", style="yellow"))
    if "attribution" in result:
        table = Table("token", "logit change", "steered", "others", "error", "latents that moved most")
        for row in result["attribution"]:
            others = ", ".join(f"{m['latent']} ({m['contribution']:+.2f})" for m in row["top_latents"][:3])
            numbers = [f"{row[name]:+.2f}" for name in ("change", "steered", "other_latents", "error_term")]
            table.add_row(Text(repr(row["text"])), *numbers, others)
        out.print(table)
    for path in (options.save, options.gguf):
        if path is not None:
            out.print(f"saved {path}", markup=False)

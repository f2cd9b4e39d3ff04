"""``saelab steer``: continue prompts with a latent turned up, clamped or taken out, or with a saved recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table
from rich.text import Text

from saelab.cli.console import console, out, parse, print_json
from saelab.cli.opening import open_run
from saelab.errors import UserError
from saelab.layout import RECIPE
from saelab.lm import load_model
from saelab.runs import Run
from saelab.steering import (
    Ablate,
    Add,
    Clamp,
    Intervention,
    MinClamp,
    ProjectOut,
    Recipe,
    Sampling,
    Scale,
    SteeringVector,
    calibrate,
    explain,
    generate,
)
from saelab.steering.recipe import check_free, check_parent, export_gguf
from saelab.steering.vectors import parse_strength, pole_sign

Operation = Literal["add", "scale", "clamp", "min-clamp", "ablate", "project-out"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to steer with, and what to write."""

    run: tyro.conf.Positional[str]
    """Run folder, an SAE of another tool (a file, a folder or a hub id such as hf://org/repo/path), or the folder of a
    recipe."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Text to continue; give the option again for more prompts."""
    latent: int | None = None
    """Latent to steer with (not for a recipe)."""
    pole: str = "+"
    """Which pole of the latent: + or -."""
    operation: Operation = "add"
    """What to do: add the latent's direction, scale its activation, clamp it to a value, raise it to at least a value
    (min-clamp), ablate it, or project its direction out."""
    strength: str = "1max"
    """For add: length in units of the activations, or multiples of the latent's maximum (0.8max), of the activations'
    norm (0.5norm); auto finds it at --budget-kl. For clamp: an activation or a multiple of the maximum.
    For scale: a factor."""
    budget_kl: float = 0.3
    """With --strength auto: mean KL per token on the prompts, in nats."""
    where: Literal["all", "prompt", "generated"] = "all"
    """On which tokens."""
    hook: str | None = None
    """Point of the model that the SAE belongs to; by default what its files say."""
    model: str | None = None
    """Language model; by default the one the run's activations came from."""
    max_new_tokens: int = 40
    """Tokens to write."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    seed: int = 0
    """Seed of the sampling."""
    chat: bool = False
    """Wrap each prompt in the model's chat template, as a user's message."""
    compare: bool = False
    """Also continue each prompt without steering."""
    explain: bool = False
    """Split the logit of each steered token of the first prompt into latents and error term."""
    save: Path | None = None
    """Write the intervention as a recipe into this folder."""
    overwrite: bool = False
    """Replace an existing recipe."""
    gguf: Path | None = None
    """Write the vector as a llama.cpp control vector."""
    json: bool = False
    """Print one JSON document on stdout."""


def main(args: Sequence[str]) -> None:
    """Load, steer, show."""
    options = parse(Options, "steer", args, "Steer a language model with a latent or a recipe.")
    if not options.prompt and options.save is None and options.gguf is None:
        raise UserError('nothing to do: give --prompt "text", --save RECIPE or --gguf FILE')
    check_outputs(options)
    if (Path(options.run) / RECIPE).is_file():
        if options.latent is not None:
            raise UserError("a recipe names its own latents; leave out --latent")
        if options.hook is not None:
            raise UserError("a recipe names its own hook points; leave out --hook")
        run, recipe = None, Recipe.load(options.run)
        model = load(options.model or recipe.model.name)
    else:
        run, recipe = open_run(options.run, options.hook or ""), None
        check(options, run)
        model = load(options.model or run.model_name)
    prompts = [chat(model, prompt) for prompt in options.prompt] if options.chat else options.prompt
    if recipe is None:
        assert run is not None
        recipe = Recipe.of(model, intervention(options, run, model, prompts), name=f"latent {options.latent}")
    result = {
        "model": recipe.model.name,
        "interventions": recipe.describe(),
        "texts": texts(options, recipe, model, prompts),
    }
    if options.explain and prompts:
        result["explanation"] = explained(options, recipe, run, model, prompts[0])
    if options.save is not None:
        recipe.save(options.save, options.overwrite)
    if options.gguf is not None:
        export_gguf(recipe, options.gguf)
    if options.json:
        print_json(result)
    else:
        show(options, result)


def check_outputs(options: Options) -> None:
    """Refuse before anything is loaded what could not be written afterwards."""
    if options.explain and not options.prompt:
        raise UserError('--explain explains what is written after a prompt: give --prompt "text"')
    Sampling(options.max_new_tokens, options.temperature, seed=options.seed)
    if options.save is not None:
        check_free(options.save, options.overwrite)
    if options.gguf is not None:
        if options.gguf.is_dir():
            raise UserError(f"{options.gguf} is a folder; --gguf names a file")
        check_parent(options.gguf)


def check(options: Options, run: Run) -> None:
    """Refuse what needs no language model to refuse."""
    if options.latent is None:
        raise UserError("name the latent to steer with: --latent 12")
    run.check_latent(options.latent)
    _ = run.hook_name  # refuses where nothing says which
    pole_sign(options.pole)
    if options.strength != "auto":
        parse_strength(options.strength)
        make(options, run, options.strength)
    elif options.operation != "add":
        raise UserError("--strength auto works with --operation add only")
    elif not options.prompt:
        raise UserError("--strength auto is found on prompts: give --prompt")


def load(name: str | None) -> Any:
    """The language model by name."""
    if not name:
        raise UserError("the run does not say which language model it belongs to; give --model")
    console.print(f"loading {name}", markup=False)
    return load_model(name)


def chat(model: Any, prompt: str) -> str:
    """The prompt as a user's message in the model's chat template."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise UserError("the model's tokenizer has no chat template; leave out --chat")
    message = [{"role": "user", "content": prompt}]
    return model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def make(options: Options, run: Run, strength: str) -> Intervention:
    """The intervention the options describe."""
    latent, pole, where = options.latent or 0, pole_sign(options.pole), options.where
    vector = SteeringVector.from_latent(run, latent, pole)
    if options.operation == "add":
        return Add(vector, strength, where=where)
    if options.operation == "project-out":
        return ProjectOut(vector, where=where)
    if options.operation == "ablate":
        return Ablate(run, latent, pole=pole, where=where)
    if options.operation == "scale":
        factor, unit = parse_strength(strength)
        if unit:
            raise UserError(f"--operation scale takes a factor such as --strength 2, not {strength}")
        return Scale(run, latent, factor, pole=pole, where=where)
    kind = Clamp if options.operation == "clamp" else MinClamp
    return kind(run, latent, strength, pole=pole, where=where)


def intervention(options: Options, run: Run, model: Any, prompts: Sequence[str]) -> Intervention:
    """The intervention, its strength found by calibration where that was asked for."""
    if options.strength != "auto":
        return make(options, run, options.strength)
    vector = SteeringVector.from_latent(run, options.latent or 0, pole_sign(options.pole))
    found = calibrate(vector, model, prompts, budget_kl=options.budget_kl)
    console.print(
        f"strength {found.strength:.3g}: KL {found.damage:.3g} of a budget of {found.budget:g} nats per token"
    )
    return make(options, run, repr(found.strength))


def texts(options: Options, recipe: Recipe, model: Any, prompts: Sequence[str]) -> list[dict[str, str]]:
    """Each prompt's continuations."""
    if not prompts:
        return []
    sampling = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "seed")}
    with recipe.attach(model):
        steered = generate(model, list(prompts), **sampling)
    rows = [{"prompt": prompt, "steered": text} for prompt, text in zip(prompts, steered)]
    if options.compare:
        for row, text in zip(rows, generate(model, list(prompts), **sampling)):
            row["unsteered"] = text
    return rows


def explained(options: Options, recipe: Recipe, run: Run | None, model: Any, prompt: str) -> list[dict[str, Any]]:
    """Every steered token of one prompt, explained."""
    if run is None:
        raise UserError("--explain needs the SAE: steer from a run folder")
    rows = explain(model, prompt, recipe.interventions, run, max_new_tokens=options.max_new_tokens)
    return [dataclasses.asdict(row) | {"change": row.change} for row in rows]


def show(options: Options, result: dict[str, Any]) -> None:
    """The texts side by side, then the explanation."""
    for entry in result["interventions"]:
        out.print(
            ", ".join(f"{key} {value}" for key, value in entry.items() if value not in (None, "")),
            style="dim",
            markup=False,
        )
    for row in result["texts"]:
        out.print(Text(f"\n{row['prompt']}", style="bold"))
        for kind in ("unsteered", "steered"):
            if kind in row:
                out.print(Text(f"  {kind:<10}", style="dim"), Text(row[kind]))
    if "explanation" in result:
        table = Table("token", "logit change", "steered", "others", "error", "latents that moved most")
        for row in result["explanation"]:
            others = ", ".join(f"{m['latent']} ({m['contribution']:+.2f})" for m in row["top_latents"][:3])
            numbers = [f"{row[name]:+.2f}" for name in ("change", "steered", "other_latents", "error_term")]
            table.add_row(Text(repr(row["text"])), *numbers, others)
        out.print(table)
    for path in (options.save, options.gguf):
        if path is not None:
            out.print(f"saved {path}", markup=False)

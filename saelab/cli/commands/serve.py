"""``saelab serve``: a steered model behind OpenAI's chat-completions protocol."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab.cli.console import out, parse
from saelab.cli.models import ModelOptions, open_model
from saelab.cli.placement import computing_device, join
from saelab.errors import UserError
from saelab.lm.record import ModelRecord
from saelab.steering import Recipe


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """What to serve, and where."""

    recipes: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of recipes, all of one model; clients name them by the name of the folder."""
    port: int = 8000
    """Port on 127.0.0.1; 0 takes one that is free."""
    max_new_tokens: int = 1024
    """Tokens of an answer, where the client names no limit."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions, OwnOptions):
    """What to serve, and where."""


def main(args: Sequence[str]) -> None:
    """Load, listen, answer."""
    options = parse(Options, "serve", args, "Answer OpenAI's chat-completions protocol with a steered model.")
    check(options)
    from saelab.serving.server import HOST, Served, bound, recipe_names, serve

    named = recipe_names(options.recipes)
    recipes = {name: Recipe.load(folder) for name, folder in named.items()}
    listener = bound(options.port)  # before the model is loaded
    try:
        join(False, computing_device(options.device))
        first = next(iter(recipes.values()), None)
        record = ModelRecord() if first is None else first.model.record
        # Each recipe checks the model itself: its architecture and sizes too.
        model = open_model(dataclasses.replace(options, any_weights=True), record, "the recipe")
        for recipe in recipes.values():
            recipe.model.check(model, options.any_weights)
        base = Path(options.model or record.name or "model").name
        served = Served(model, recipes, base, options.max_new_tokens)
        port = listener.getsockname()[1]
        out.print(f"http://{HOST}:{port}/v1 answers as {', '.join(served.names)}", markup=False, soft_wrap=True)
        serve(served, listener)
    finally:
        listener.close()


def check(options: Options) -> None:
    """Refuse what cannot be served, before anything is loaded."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f'saelab serve needs {" and ".join(missing)}: pip install "saelab[serve]"')
    if not options.recipes and options.model is None:
        raise UserError("nothing to serve: give folders of recipes, or --model for the model alone")
    if not 0 <= options.port < 65536:
        raise UserError(f"port {options.port} is not between 0 and 65535")
    if options.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={options.max_new_tokens} must be 1 or more")

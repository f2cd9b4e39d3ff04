"""``saelab find``: latents by words, by a number, or by a marked text, in one SAE or in several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro

from saelab.cli.console import console, out, parse, part, print_json
from saelab.cli.models import ModelOptions, open_model
from saelab.errors import UserError
from saelab.features import search
from saelab.features.by_example import find_by_example
from saelab.features.finding import ANYTHING, WRITES, Finder, read_query
from saelab.lm.record import check_weights, load_settings
from saelab.metrics.density import DENSE
from saelab.runs import Run
from saelab.runs.language_model import model_record, untrained_start
from saelab.workspace import Workspace
from saelab.workspace.notes import read_notes

SCORES = ("share", "output_score", "specificity", "closeness")
COLUMNS = ("SAE", "latent", "pole", *SCORES, "density", "label_score", "label")


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """What to find, and where."""

    query: tyro.conf.Positional[str] = ""
    """Words (whole ones, `*` stands for any letters, "..." holds a phrase together), a latent's number, or a text with
    `[[marks]]`, which is run through the language model."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders with a feature index, or folders that hold some."""
    where: str = ANYTHING
    """Search only the label, the explanation, what latents fire on, promote or suppress."""
    contrast: str | None = None
    """With a marked text: a text on which the latents should be silent."""
    related: bool = False
    """Find words of similar meaning too, by latent semantic analysis of the index."""
    writes: bool = False
    """Rank by what latents promote instead of what they fire on: the share of the promoted logits that falls on the
    words (the output score). `saelab steer --concept` measures in the model what they do."""
    dense: bool = False
    """Show latents that fire on more than 10 % of the tokens."""
    count: int = 10
    """Latents to print, of each SAE."""
    json: bool = False
    """Print them as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Search and print the best."""
    options = parse(Options, "find", args, "Find latents by words, by a number, or by a marked text.")
    if options.where not in {ANYTHING, *search.TEXT_COLUMNS}:
        raise UserError(f"where={options.where!r} is none of {', '.join([ANYTHING, *search.TEXT_COLUMNS])}")
    if options.count < 1:
        raise UserError(f"count={options.count} must be at least 1")
    runs = opened(options.runs)
    models: dict[tuple[str | None, ...], Any] = {}  # several SAEs may be of one model
    by_text = read_query(options.query).kind == "text" or options.contrast is not None
    parts = [
        (by_example(run, options, models) if by_text else by_words(run, name, options)).assign(SAE=name)
        for name, run in runs.items()
    ]
    found: Any = pd.concat(parts, ignore_index=True)
    order = next(name for name in ("specificity", "score") if name in found)
    found = found.sort_values(order, ascending=False, kind="stable")
    kept = found.columns[found.notna().any()]
    names = [name for name in COLUMNS if name in kept and (name != "SAE" or len(runs) > 1)]
    if options.json:
        print_json(found[names].astype(object).where(found[names].notna(), None).to_dict("records"))
    else:
        show(found[names])


def opened(places: Sequence[Path]) -> dict[str, Run]:
    """The runs with an index at these places, by name."""
    if not places:
        raise UserError("name a run folder, or a folder of runs, to search in")
    found: dict[str, Run] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place} is not a folder")
        inside = Workspace.scan(place).runs
        found |= {str(place if name == "." else place / name): run for name, run in inside.items() if run.has_index}
    if not found:
        raise UserError(f"no run with a feature index in {', '.join(map(str, places))}; make one with `saelab index`")
    return found


def by_words(run: Run, name: str, options: Options) -> pd.DataFrame:
    """The best rows of one SAE for words or a number."""
    assert run.index is not None
    finder = Finder(run.index)
    if options.writes and read_query(options.query).kind != "words":
        raise UserError('--writes takes words, as in saelab find "sea ocean" RUN --writes')
    where = WRITES if options.writes else options.where
    found: Any = finder.find(options.query, where, read_notes(str(run.path)))
    if not options.dense:
        hidden = (found["density"] > DENSE) & ~(found["score"] == float("inf"))
        if hidden.any():
            console.print(f"{name}: {int(hidden.sum())} dense latents are hidden; --dense shows them", markup=False)
        found = found[~hidden]
    found = found.head(options.count)
    if options.related:
        close, near = finder.related(options.query, options.count)
        console.print(f"{name}: close words: {', '.join(near) or 'none'}", markup=False)
        found = pd.concat([found, close[~close.index.isin(found.index)].assign(score=-1.0)])
    return found


def by_example(run: Run, options: Options, models: dict[tuple[str | None, ...], Any]) -> pd.DataFrame:
    """The best rows of one SAE for a marked text."""
    from saelab.prompt.reading import read_prompt

    assert run.index is not None
    record, what = model_record(run), f"the SAE {run.name}"
    name = options.model or record.name
    same = name, *load_settings(record, name, options.model_dtype, options.revision)
    if same in models:
        check_weights(models[same], record, what, options.any_weights)
    else:
        models[same] = open_model(part(ModelOptions, options), record, what)
    model = models[same]
    hook = run.metadata.get("hook_name")
    if not hook:
        raise UserError(f"{run.path} records no hook point; index it over a cache of that hook point")
    plain, spans = search.marked(options.query)
    place: dict[str, Any] = {"bos": bool(run.metadata.get("prepend_bos", True))}
    place["skip_first"] = untrained_start(run)
    place["hook_name_out"] = run.metadata.get("hook_name_out", "")  # of a transcoder
    read = read_prompt(model, run.sae, plain, hook, **place)
    other = read_prompt(model, run.sae, options.contrast, hook, **place) if options.contrast else None
    marks = torch.tensor(search.tokens_in(read.strings, spans, offset=read.front)[read.first :])
    contrast = None if other is None else other.code[other.first : other.n]
    return find_by_example(run.index, read.code[read.first : read.n], marks, contrast, top=options.count)


def show(found: pd.DataFrame) -> None:
    """One line per latent."""
    if found.empty:
        out.print("no latent fits")
    for row in found.to_dict("records"):
        out.print("  ".join(_cell(name, value) for name, value in row.items()), markup=False, soft_wrap=True)


def _cell(name: str, value: Any) -> str:
    if name == "latent":
        return f"#{value:<6}"
    if name == "pole":
        return "+" if value > 0 else "-"
    if name == "density":
        return f"fires on {100 * value:.2g}%"
    if isinstance(value, float):
        return f"{name.removeprefix('label_')} {value:5.2f}" if value == value else f"no {name.removeprefix('label_')}"
    return str(value)

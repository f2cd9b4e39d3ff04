"""``saelab convert``: an SAE of one tool as a checkpoint of another, with a numerical proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from saelab.cli.commands.inspect import FormatHints
from saelab.cli.console import counting, out, parse, print_json
from saelab.cli.opening import open_run, provenance
from saelab.errors import UserError
from saelab.interop import export, resave, writers
from saelab.interop.conversion import SET, TOLERANCE, add_layer
from saelab.runs import Run


@dataclasses.dataclass(frozen=True)
class Options(FormatHints):
    """What to convert, into which format."""

    source: tyro.conf.Positional[str]
    """File, folder or hub id (hf://org/repo/path) of an SAE, whichever tool wrote it."""
    out: tyro.conf.Positional[Path]
    """New folder to write; for circuit-tracer also one that it has written, which gets one more layer."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the matrices in a saelab run folder (`--to saelab`); 16 bits halve its size."""
    cache: Path | None = None
    """For saedashboard: the activation cache of the index; adds the name of the corpus and logit histograms."""
    latents: int | None = None
    """For saedashboard: number of latents to write, from the first; by default all."""
    json: bool = False
    """Print the proof as JSON."""


TO = "Format of the new folder. saedashboard writes the run's feature index as files that Neuronpedia imports."


def options_type() -> Any:
    """The options; the choices of ``--to`` are the formats that saelab can write."""
    choices = Literal[(*writers(), "saelab", "saedashboard")]  # pyright: ignore[reportInvalidTypeForm]
    to = ("to", Annotated[choices, tyro.conf.arg(help=TO)], dataclasses.field(default="saelens"))
    return dataclasses.make_dataclass("ConvertOptions", [to], bases=(Options,), frozen=True)


def main(args: Sequence[str]) -> None:
    """Convert, compare both SAEs numerically, and keep the result only if they agree."""
    options = parse(options_type(), "convert", args, "Convert an SAE and prove that it computes the same.")
    adds = options.to == "circuit-tracer" and (options.out / SET).is_file()
    if options.out.exists() and not adds:
        raise UserError(f"{options.out} exists; name a new folder")
    run = open_run(options.source, **options.hints())
    assert run.path is not None
    if options.to == "saedashboard":
        dashboard(run, options)
        return
    if options.to == "saelab":
        proof = resave(run.sae, run.path, options.out, provenance(run), getattr(torch, options.dtype))
    elif options.dtype != "float32":
        raise UserError(f"--dtype {options.dtype} is for --to saelab; {options.to} folders are written in float32")
    elif adds:
        proof = add_layer(run.sae, options.out, provenance(run))
    else:
        proof = export(run.sae, options.out, options.to, provenance(run))
    if options.json:
        print_json({"max_relative_encode": proof.encode, "max_relative_decode": proof.decode, "tolerance": TOLERANCE})
        return
    out.print(f"max |Δ encode| {proof.encode:.1e}, max |Δ decode| {proof.decode:.1e} (relative, limit {TOLERANCE:.0e})")
    out.print(f"{options.source} -> {options.out} ({options.to})", markup=False, soft_wrap=True)


def dashboard(run: Run, options: Options) -> None:
    """Write the feature index of a run as SAEDashboard's batches."""
    from saelab.cli.commands.index import LensOptions, load_lens
    from saelab.data.cache import ActivationCache
    from saelab.features import FeatureIndex
    from saelab.features.saedashboard import write_dashboard

    assert run.path is not None
    index = run.index or FeatureIndex(run.path)  # which says how to make one
    cache = ActivationCache(options.cache) if options.cache else None
    lens = load_lens(LensOptions(), cache) if cache else None
    with counting("features") as progress:
        write_dashboard(
            index,
            run.sae,
            options.out,
            cache=cache,
            lens=lens,
            max_latents=options.latents,
            progress=progress,
        )
    out.print(f"{options.source} -> {options.out} (SAEDashboard's batches, for Neuronpedia)", markup=False)

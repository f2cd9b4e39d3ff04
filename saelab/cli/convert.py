"""``saelab convert``: an SAE of one tool as a checkpoint of another, with a numerical proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro

from saelab.cli.common import out, parse, print_json
from saelab.cli.inspect import told
from saelab.errors import UserError
from saelab.interop import export
from saelab.interop.copy import copy
from saelab.interop.detect import load_with_metadata
from saelab.interop.export import TOLERANCE


@dataclasses.dataclass(frozen=True)
class Options:
    """From where to where."""

    source: tyro.conf.Positional[str]
    """File, folder or hub id of an SAE, whichever tool wrote it."""
    out: tyro.conf.Positional[Path]
    """New folder to write."""
    to: Literal["saelens", "sparsify", "dictionary-learning", "saelab"] = "saelens"
    """Format of the new folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the matrices in a saelab run folder (`--to saelab`); 16 bits halve it."""
    k: int | None = None
    """For a bare overcomplete state dict: latents per token, or steps of a pursuit."""
    pursuit: bool = False
    """For a bare overcomplete state dict: it is a matching pursuit."""
    threshold: float | None = None
    """For a bare overcomplete state dict: the running threshold of a BatchTopK SAE, in raw units."""
    json: bool = False
    """Print the proof as JSON."""


def main(args: Sequence[str]) -> None:
    """Convert, prove, and only then keep the result."""
    options = parse(Options, "convert", args, "Convert an SAE between tools and prove that it computes the same.")
    if options.out.exists():
        raise UserError(f"{options.out} exists; name a new folder")
    sae, metadata, source = load_with_metadata(options.source, **told(options))
    if options.to == "saelab":
        proof = copy(sae, source, options.out, metadata, getattr(torch, options.dtype))
    elif options.dtype != "float32":
        raise UserError(f"--dtype {options.dtype} is for --to saelab; {options.to} folders are written in float32")
    else:
        proof = export(sae, options.out, options.to, metadata)
    if options.json:
        print_json({"max_relative_encode": proof.encode, "max_relative_decode": proof.decode, "tolerance": TOLERANCE})
        return
    out.print(f"max |Δ encode| {proof.encode:.1e}, max |Δ decode| {proof.decode:.1e} (relative, limit {TOLERANCE:.0e})")
    out.print(f"{options.source} -> {options.out} ({options.to})")

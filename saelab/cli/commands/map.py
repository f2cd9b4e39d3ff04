"""``saelab map``: lay out the latents of a run in the plane, for the app's map."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from saelab.cli.console import console, out, parse, with_local_run
from saelab.errors import UserError
from saelab.features.projection import MOST, lay_out, save_map
from saelab.features.search import per_latent
from saelab.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run."""

    run: tyro.conf.Positional[Path]
    """Run folder; map.parquet is written into it. With a feature index, latents that never fire are left out."""
    most: int = MOST
    """Latents on the map, drawn at random where there are more."""
    seed: int = 0
    """Seed of the draw and of t-SNE."""


def main(args: Sequence[str]) -> None:
    """Lay out and save."""
    options = parse(Options, "map", args, "Lay out all latents in the plane by their decoder directions (t-SNE).")
    if options.most < 4:
        raise UserError(f"most={options.most} must be at least 4")
    options = with_local_run(options)
    run = Run.open(options.run)
    keep = None if run.index is None else np.flatnonzero(per_latent(run.index.table(), "count"))
    with console.status("laying out the latents"):
        places = lay_out(run.sae, keep, options.most, options.seed)
    save_map(options.run, places, run.fingerprint)
    out.print(f"{len(places):,} latents laid out; the app's Map page shows them", markup=False)

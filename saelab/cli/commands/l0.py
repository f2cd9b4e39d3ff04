"""``saelab l0``: which number of active latents fits the activations, from SAEs that were trained with several."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.table import Table

from saelab.cli.console import out, parse, print_json
from saelab.cli.opening import open_run
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation.reconstruction import check_pair
from saelab.layout import SWEEP_TABLE
from saelab.metrics import decoder_projections, mean_cosine
from saelab.runs import Run
from saelab.sweep import load_results
from saelab.sweep.caches import apart
from saelab.sweep.guidance import Point, guidance


@dataclasses.dataclass(frozen=True)
class Options:
    """Which SAEs, and on what."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs that differ in the number of active latents, at least three of them; or the folder of a sweep."""
    cache: Path
    """Folder of the activation cache; L0 and projections are measured on its held-out rows."""
    tokens: int = 8192
    """Held-out rows to measure on, spread over the split."""
    places: tuple[int, ...] = ()
    """The n of the n-th decoder projections; by default 1.5 times the largest L0 compared, and twice it."""
    json: bool = False
    """Print the numbers as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The numbers of one SAE."""

    run: str
    group: str
    seed: int
    l0: float
    mean_cosine: float
    projections: dict[int, float]


def main(args: Sequence[str]) -> None:
    """Measure each SAE, print the numbers by L0, and what they say."""
    options = parse(Options, "l0", args, "Which k? Compare SAEs that differ in their number of active latents.")
    if options.tokens < 1:
        raise UserError(f"tokens={options.tokens} must be at least 1")
    cache = ActivationCache(options.cache)
    rows = measure(members(options.runs), cache, options.tokens, options.places)
    found = guidance(Point(row.group, row.l0, row.mean_cosine, row.seed) for row in rows)
    found += guidance(
        Point(f"{row.group}, {n}-th projection", row.l0, value, row.seed)
        for row in rows
        for n, value in row.projections.items()
    )
    if options.json:
        print_json({"saes": [dataclasses.asdict(row) for row in rows], "guidance": [g._asdict() for g in found]})
        return
    places = list(rows[0].projections)
    table = Table("SAE", "L0", "mean |cosine|", *(f"projection {n}" for n in places), box=None, pad_edge=False)
    for row in rows:
        cells = [f"{row.projections[n]:.4f}" for n in places]
        table.add_row(row.run, f"{row.l0:.1f}", f"{row.mean_cosine:.4f}", *cells)
    out.print(table)
    for one in found:
        out.print(one.sentence, markup=False, soft_wrap=True)
    if not found:
        out.print("cannot say: every SAE is of a kind of its own; compare SAEs that differ in k alone")


def members(names: Sequence[str]) -> list[Run]:
    """The runs that are named, and in place of a sweep's folder its finished ones."""
    found: list[Run] = []
    for name in names:
        if (Path(name) / SWEEP_TABLE).is_file():
            done = [row for row in load_results(name) if row["status"] == "finished"]
            found += [open_run(Path(name) / row["folder"]) for row in done]
        else:
            found.append(open_run(name))
    if len(found) < 2:
        raise UserError(f"{len(found)} SAE is no comparison; name several that differ in k, or a sweep")
    return found


@torch.no_grad()
def measure(runs: Sequence[Run], cache: ActivationCache, tokens: int, places: Sequence[int] = ()) -> list[Row]:
    """The numbers of each SAE on held-out rows, by L0."""
    for run in runs:
        check_pair(run.sae, cache, "held_out")
    x = cache.read(cache.spread_rows(tokens, "held_out")).acts
    measured = []
    for run in runs:
        code = run.sae.features(run.sae.encode(x.to(run.sae.device)))
        measured.append((run, float((code.values != 0).sum()) / code.n))
    most, narrowest = max(l0 for _, l0 in measured), min(run.sae.n_features for run in runs)
    chosen = places or tuple(dict.fromkeys(round(f * most) for f in (1.5, 2) if 1 <= f * most < narrowest))
    rows = []
    kinds = groups(runs)
    for run, l0 in sorted(measured, key=lambda pair: pair[1]):
        sae = run.sae
        read, offset = sae.as_read(x.to(sae.device)).cpu(), sae.reader.b_dec.cpu()
        values = decoder_projections(read, sae.directions.cpu(), offset, chosen, sae.signed)
        seed = _trained(run).get("seed", 0)
        group = kinds[runs.index(run)]
        rows.append(Row(run.name, group, seed, l0, mean_cosine(sae.directions), dict(zip(chosen, values))))
    return rows


def groups(runs: Sequence[Run]) -> list[str]:
    """What each SAE is besides its number of active latents and its seed: variant, width, options and training.

    A learning rate that was computed or tuned differs between numbers of active latents, and a run does not say how it
    came to its own. So rates tell SAEs apart where some of one kind, number and seed have several.
    """
    kinds, same = [], ("seed", "data_seed", "lr")
    trained = apart([{name: v for name, v in _trained(run).items() if name not in same} for run in runs])
    for run, training in zip(runs, trained):
        sae = run.sae
        options = {name: v for name, v in run.settings.items() if name not in (sae.l0_option, "d_in", "d_sae")}
        said = [json.dumps(options, sort_keys=True)] if options and not run.is_foreign else []
        said += [f"{name}={value}" for name, value in training.items()]
        kinds.append(" ".join([sae.variant, str(sae.d_sae), *said]))
    rates: dict[tuple[Any, ...], set[Any]] = {}
    for run, kind in zip(runs, kinds):
        like = kind, _trained(run).get("seed"), run.settings.get(run.sae.l0_option or "")
        rates.setdefault(like, set()).add(_trained(run).get("lr"))
    listed = {kind for (kind, *_), several in rates.items() if len(several) > 1}
    return [f"{kind} lr={_trained(run).get('lr')}" if kind in listed else kind for run, kind in zip(runs, kinds)]


def _trained(run: Run) -> dict[str, Any]:
    return run.metadata.get("train") or {}

"""What a sweep over widths says of feature hedging (see :mod:`saelab.metrics.hedging`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saelab.errors import UserError
from saelab.metrics.hedging import Hedging, hedging
from saelab.metrics.intervals import t_interval
from saelab.sae.weights import load_sae
from saelab.sweep.caches import places_of, trained_apart

Row = Mapping[str, Any]


def hedging_of_widths(rows: Sequence[Row], folder: Path | str) -> list[str]:
    """A sentence for each two neighbouring widths of SAEs that are otherwise alike, by the sweep's table and folder."""
    groups: dict[tuple[Any, ...], dict[int, dict[int, Row]]] = {}
    apart = [training + place for training, place in zip(trained_apart(rows), places_of(rows))]
    for row, place in zip(rows, apart):
        if row["status"] == "finished":
            kind = (row["variant"], row["asked_l0"], row["options"], place)
            groups.setdefault(kind, {}).setdefault(row["d_sae"], {})[row["seed"]] = row
    return [
        _sentence(kind, narrow, wide, by_width, Path(folder))
        for kind, by_width in groups.items()
        for narrow, wide in itertools.pairwise(sorted(by_width))
    ]


def _sentence(
    kind: tuple[Any, ...], narrow: int, wide: int, by_width: Mapping[int, Mapping[int, Row]], folder: Path
) -> str:
    l0 = "" if kind[1] is None else f" at {kind[1]:g} active latents"
    name = f"{kind[0]}{l0}{kind[3]}, {narrow} latents beside {wide}"
    seeds = sorted(by_width[narrow].keys() & by_width[wide].keys())
    found: list[Hedging] = []
    try:
        for seed in seeds:
            a, b = (load_sae(folder / by_width[width][seed]["folder"]) for width in (narrow, wide))
            found.append(hedging(a.W_dec, b.W_dec, a.signed))
    except UserError as error:
        return f"{name}: cannot say: {error}"
    if not found:
        return f"{name}: cannot say: no seed has both"
    rates = np.array([one.rate for one in found])
    interval = "one seed: no interval"
    if len(rates) > 1:
        low, high = t_interval(rates)
        interval = f"95 % over {len(rates)} seeds {low:.3f} to {high:.3f}"
    mean = [float(np.mean([getattr(one, name) for one in found])) for name in ("projected", "baseline", "matched")]
    changed, chance, matched = mean
    return (
        f"{name}: hedging {rates.mean():.3f} ({interval}); {matched:.0f} latents are in both, and change by "
        f"{changed:.3f} along {found[0].new} new ones, {chance:.3f} along as many random directions"
    )

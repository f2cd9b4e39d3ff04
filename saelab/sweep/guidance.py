"""Which number of active latents? SAEs that differ in it, compared by how much their directions overlap.

After Chanin and Garriga-Alonso (2025, arXiv 2508.16560): with fewer active latents than features are active, directions
mix correlated features, and with more, they mix what is left; ``c_dec``, the mean magnitude of the cosines between
directions, is lowest near the right number, and so is the n-th decoder projection for n above it. FVU cannot tell,
since it falls with every latent that may be active. Nothing is said where the lowest is the first or the last of the
numbers compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saelab.sweep.caches import places_of, trained_apart

FEWEST = 3  # numbers of active latents that a minimum between them needs
PARTS = ("variant", "d_sae", "options")


class Point(NamedTuple):
    """One SAE: what it is besides the number of active latents, that number as measured, and the overlap."""

    group: str
    l0: float
    overlap: float
    seed: int = 0


class Guidance(NamedTuple):
    """What a group of SAEs says. ``l0`` is None where it says nothing; ``between`` are its neighbours."""

    group: str
    l0: float | None
    between: tuple[float, float] | None
    curve: list[tuple[float, float]]  # L0 and mean overlap over seeds, ascending
    sentence: str


def guidance(points: Iterable[Point]) -> list[Guidance]:
    """For each group that differs in the number of active latents, the number with the lowest overlap."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return [_guide(name, members) for name, members in groups.items() if len(members) > 1]


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of a sweep's table (:func:`saelab.sweep.load_results`); rows without the numbers are left out."""
    found = []
    for row, training, place in zip(rows, trained_apart(rows), places_of(rows)):
        if row.get("mean_cosine") is not None and row["l0"] is not None:
            options = json.loads(row["options"] or "{}")
            rest = {name: value for name, value in sorted(options.items()) if name not in ("k", "l0", "n_steps")}
            said = "".join(f" {name}={value}" for name, value in rest.items()) + training
            found.append(
                Point(f"{row['variant']} {row['d_sae']}{said}{place}", row["l0"], row["mean_cosine"], row["seed"] or 0)
            )
    return found


def _guide(name: str, members: Sequence[Point]) -> Guidance:
    by_seed: dict[int, list[Point]] = {}
    for point in members:
        by_seed.setdefault(point.seed, []).append(point)
    lengths = {len(points) for points in by_seed.values()}
    # The k-th smallest L0 of each seed belong together: measured numbers differ a little between seeds.
    ranked = [sorted(points, key=lambda point: point.l0) for points in by_seed.values()]
    if len(lengths) > 1 or min(lengths) < FEWEST:
        text = f"{name}: cannot say from {min(lengths)}; it takes at least {FEWEST} numbers of active latents"
        return Guidance(name, None, None, [(p.l0, p.overlap) for p in ranked[0]], text)
    l0 = np.array([[point.l0 for point in points] for points in ranked]).mean(0)
    overlap = np.array([[point.overlap for point in points] for points in ranked])
    curve = list(zip(l0.tolist(), overlap.mean(0).tolist()))
    lowest, own = int(overlap.mean(0).argmin()), sorted(set(overlap.argmin(1).tolist()))
    if lowest in (0, len(l0) - 1):
        side = "smallest" if lowest == 0 else "largest"
        beyond = "fewer" if lowest == 0 else "more"
        text = f"{name}: cannot say: the overlap of directions is lowest at the {side} L0 compared, {l0[lowest]:.3g}; "
        return Guidance(name, None, None, curve, text + f"train SAEs with {beyond} active latents")
    between = float(l0[lowest - 1]), float(l0[lowest + 1])
    seeds = "one seed" if len(ranked) == 1 else f"{len(ranked)} seeds"
    if len(own) > 1:
        seeds += f", which differ: {', '.join(f'{l0[i]:.3g}' for i in own)}"
    text = (
        f"{name}: directions overlap least at L0 {l0[lowest]:.3g} (value {curve[lowest][1]:.4f}; neighbours "
        f"{between[0]:.3g} and {between[1]:.3g}; {seeds})"
    )
    return Guidance(name, float(l0[lowest]), between, curve, text)

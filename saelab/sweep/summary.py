"""What a sweep says about its variants: means over seeds, and differences on the same seeds and documents.

Intervals are 95 % and cover seeds and held-out documents (:func:`saelab.metrics.intervals.two_way`). SAEs that differ
only in their seed form a group. Two groups are compared where they were asked for the same number of active latents at
the same width.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saelab.errors import damaged
from saelab.evaluation.seeds import stability
from saelab.files import replace
from saelab.layout import EVALUATION, SWEEP_DIFFERENCES, SWEEP_SUMMARY
from saelab.metrics.dictionary import shared_fraction
from saelab.metrics.intervals import two_way
from saelab.sae.controller import NEAR
from saelab.sae.weights import load_sae

Row = Mapping[str, Any]
PLACE = ("hook_name", "hook_name_out")  # only SAEs of one place are compared
ALIKE = ("variant", "k", "asked_l0", "d_sae", "options", "training", *PLACE)
MEANS = ("l0", "dead_fraction", "ce_loss_recovered_zero", "lr", "cpu_seconds", "parameters")
SUMMARY = pa.schema(
    [
        ("name", pa.string()),
        ("variant", pa.string()),
        ("asked_l0", pa.float64()),
        ("d_sae", pa.int64()),
        ("options", pa.string()),
        *((name, pa.string()) for name in PLACE),
        ("seeds", pa.int64()),
        ("documents", pa.int64()),
        *((name, pa.float64()) for name in ("fvu", "fvu_low", "fvu_high", *MEANS)),  # means over the seeds
        # Mean over all pairs of seeds of the share of latents that both have, and for directions at random.
        *((name, pa.float64()) for name in ("shared_latents", "shared_by_chance")),
    ]
)
DIFFERENCES = pa.schema(
    [
        ("a", pa.string()),
        ("b", pa.string()),
        ("seeds", pa.int64()),  # that both have
        ("documents", pa.int64()),
        *((name, pa.float64()) for name in ("difference", "low", "high")),  # FVU of a minus that of b
        ("verdict", pa.string()),
    ]
)


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The finished SAEs of a sweep's table by what they agree in besides the seed, under the first one's name."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "finished" and row["fvu"] is not None:
            # A tuned rate is the same for all seeds of a group; one that the grid lists makes a group of its own.
            found.setdefault((*(row.get(name) for name in ALIKE), row["lr"]), []).append(row)
    return {_name(members): members for members in found.values()}


def summarise(rows: Sequence[Row], folder: Path | str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row per group, and a row per pair of groups that can be compared; see ``SUMMARY`` and ``DIFFERENCES``.

    ``folder`` is that of the sweep, in which the SAEs have been evaluated.
    """
    found, folder = groups(rows), Path(folder)
    by_document = {row["name"]: _by_document(folder / row["folder"]) for row in itertools.chain(*found.values())}
    summaries = [_summary(name, members, by_document, folder) for name, members in found.items()]
    return summaries, list(_differences(found, by_document))


def save_stability(rows: Sequence[Row], folder: Path | str) -> None:
    """Write into each run how many other seeds of its group have each latent (``stability.json``)."""
    for members in groups(rows).values():
        saes = [load_sae(Path(folder) / row["folder"]) for row in members] if len(members) > 1 else []
        for i, row in enumerate(members if saes else ()):
            others = [other for j, other in enumerate(saes) if j != i]
            names = [other["name"] for j, other in enumerate(members) if j != i]
            stability(saes[i], others, names).save(Path(folder) / row["folder"])


def save_summary(summaries: Sequence[Row], differences: Sequence[Row], folder: Path | str) -> tuple[Path, Path]:
    """Write ``sweep_summary.parquet`` and ``sweep_differences.parquet``."""
    paths = Path(folder) / SWEEP_SUMMARY, Path(folder) / SWEEP_DIFFERENCES
    for path, rows, schema in zip(paths, (summaries, differences), (SUMMARY, DIFFERENCES)):
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        replace(path, lambda temporary, table=table: pq.write_table(table, temporary))
    return paths


def load_summary(folder: Path | str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both tables; empty for a sweep of version 0.1.0, which has none."""
    paths = [Path(folder) / name for name in (SWEEP_SUMMARY, SWEEP_DIFFERENCES)]
    if not all(path.is_file() for path in paths):
        return [], []
    first, second = (pq.read_table(path).to_pylist() for path in paths)
    return first, second


def _name(members: Sequence[Row]) -> str:
    first = members[0]
    return str(first["name"]).removesuffix(f"_seed-{first['seed']}").replace(f"_seed-{first['seed']}_", "_")


def _by_document(folder: Path) -> dict[str, np.ndarray]:
    path = folder / EVALUATION
    with damaged(path, "finish the sweep again with `saelab sweep ... --resume`"):
        found = json.loads(path.read_bytes())["by_document"]
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}


def _summary(
    name: str, members: Sequence[Row], by_document: Mapping[str, dict[str, np.ndarray]], folder: Path
) -> dict[str, Any]:
    own = [by_document[row["name"]] for row in members]
    deviations = own[0]["squared_deviation"]
    fvu, low, high = two_way(np.stack([part["squared_error"] for part in own]), deviations)
    means = {column: [row[column] for row in members if row.get(column) is not None] for column in MEANS}
    saes = [load_sae(folder / row["folder"]) for row in members] if len(members) > 1 else []
    stable = [shared_fraction(a.directions, b.directions, signed=a.signed) for a, b in itertools.combinations(saes, 2)]
    first = members[0]
    return {
        "name": name,
        **{column: first.get(column) for column in ("variant", "asked_l0", "d_sae", "options", *PLACE)},
        "seeds": len(members),
        "documents": len(deviations),
        "fvu": fvu,
        "fvu_low": low,
        "fvu_high": high,
        **{column: float(np.mean(values)) if values else None for column, values in means.items()},
        "shared_latents": float(np.mean([share for share, _ in stable])) if stable else None,
        "shared_by_chance": float(np.mean([chance for _, chance in stable])) if stable else None,
    }


def _differences(
    found: Mapping[str, Sequence[Row]], by_document: Mapping[str, dict[str, np.ndarray]]
) -> Iterator[dict[str, Any]]:
    for (a, left), (b, right) in itertools.combinations(found.items(), 2):
        if any(left[0].get(name) != right[0].get(name) for name in ("asked_l0", "d_sae", *PLACE)):
            continue
        pairs = [(x, y) for x in left for y in right if x["seed"] == y["seed"]]
        if not pairs:
            continue
        errors = [by_document[x["name"]]["squared_error"] - by_document[y["name"]]["squared_error"] for x, y in pairs]
        deviations = by_document[left[0]["name"]]["squared_deviation"]
        mean, low, high = two_way(np.stack(errors), deviations)
        apart = float(np.mean([x["l0"] / y["l0"] for x, y in pairs])) - 1
        yield {
            "a": a,
            "b": b,
            "seeds": len(pairs),
            "documents": len(deviations),
            "difference": mean,
            "low": low,
            "high": high,
            "verdict": _verdict(low, high, apart, len(pairs), len(deviations)),
        }


def _verdict(low: float | None, high: float | None, apart: float, seeds: int, documents: int) -> str:
    if abs(apart) > NEAR:
        return f"cannot say: L0 differs by {apart:+.0%}"
    if low is None or high is None:
        return f"cannot say: {'one seed' if seeds < 2 else f'{documents} document'}"
    return "a is better" if high < 0 else "b is better" if low > 0 else "inconclusive"

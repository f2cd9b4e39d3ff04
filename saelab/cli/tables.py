"""The tables that a sweep prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The results by L0, those without one last."""
    table = Table("SAE", "status", "lr", "L0", "FVU", "dead", "CE recovered", box=None, pad_edge=False)
    for row in sorted(rows, key=lambda r: (r["l0"] is None, r["l0"] or 0.0)):
        numbers = [row["l0"], row["fvu"], row["dead_fraction"], row["ce_loss_recovered_zero"]]
        cells = ["" if n is None else format(n, how) for n, how in zip(numbers, (".1f", ".4f", ".1%", ".4f"))]
        table.add_row(row["name"], row["status"], _rate(row), *cells)
    return table


def summary_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Means over seeds."""
    table = Table("SAE", "seeds", "L0", "FVU", "interval", "dead", "shared by seeds", box=None, pad_edge=False)
    for row in summaries:
        interval = "cannot say" if row["fvu_low"] is None else f"{row['fvu_low']:.4f} .. {row['fvu_high']:.4f}"
        shared = ""
        if row["shared_latents"] is not None:
            shared = f"{row['shared_latents']:.1%} ({row['shared_by_chance']:.1%} by chance)"
        numbers = (f"{row['l0']:.1f}", f"{row['fvu']:.4f}", interval, f"{row['dead_fraction']:.1%}")
        table.add_row(row["name"], str(row["seeds"]), *numbers, shared)
    return table


def differences_table(differences: Sequence[dict[str, Any]]) -> Table:
    """The differences, largest first."""
    table = Table("a", "b", "FVU of a - b", "interval", "verdict", box=None, pad_edge=False)
    for row in sorted(differences, key=lambda row: -abs(row["difference"])):
        interval = "" if row["low"] is None else f"{row['low']:+.4f} .. {row['high']:+.4f}"
        table.add_row(row["a"], row["b"], f"{row['difference']:+.4f}", interval, row["verdict"])
    return table


def _rate(row: dict[str, Any]) -> str:
    lr = "" if row["lr"] is None else f"{row['lr']:.2g}"
    return f"{lr} of {len(json.loads(row['tried']))}" if row["tried"] else lr

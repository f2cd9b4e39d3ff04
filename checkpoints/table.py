"""Print the table of README.md from the evaluations in this folder: python checkpoints/table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = {
    "L0": ("l0", "{:.1f}"),
    "FVU": ("fvu", "{:.3f}"),
    "CE recovered (zero)": ("ce_loss_recovered_zero", "{:.3f}"),
    "CE recovered (mean)": ("ce_loss_recovered_mean", "{:.3f}"),
    "dead": ("dead_fraction", "{:.1%}"),
}


def table(folder: Path = HERE) -> str:
    """One row per SAE, best FVU first."""
    rows = []
    for path in sorted(folder.glob("*/evaluation.json")):
        metrics = json.loads(path.read_text())["metrics"]
        width = json.loads(path.with_name("cfg.json").read_text())["d_sae"]
        cells = [text.format(metrics[name]["value"]) for name, text in COLUMNS.values()]
        rows.append((metrics["fvu"]["value"], f"| `{path.parent.name}` | {width:,} | {' | '.join(cells)} |"))
    head = f"| folder | latents | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}"
    return "\n".join([head, *(row for _, row in sorted(rows))])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")

"""Print the table of README.md from the evaluations and indexes in this folder: python checkpoints/table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from saelab.features.indexing.labels import POOR

HERE = Path(__file__).parent
COLUMNS = {
    "L0": ("l0", "{:.1f}"),
    "FVU": ("fvu", "{:.3f}"),
    "CE recovered (zero)": ("ce_loss_recovered_zero", "{:.3f}"),
    "CE recovered (mean)": ("ce_loss_recovered_mean", "{:.3f}"),
    "dead": ("dead_fraction", "{:.1%}"),
}


def table(folder: Path = HERE) -> str:
    """One row per SAE, best FVU first within each place of the model."""
    rows = []
    for path in sorted(folder.glob("*/evaluation.json")):
        metrics = json.loads(path.read_text())["metrics"]
        config = json.loads(path.with_name("cfg.json").read_text())
        cells = [text.format(metrics[name]["value"]) for name, text in COLUMNS.values()]
        place = config["metadata"]["hook_name"]
        cells += [f"{labelled(path.parent):.0%}", f"`{place}`"]
        rows.append(
            (place, metrics["fvu"]["value"], f"| `{path.parent.name}` | {config['d_sae']:,} | {' | '.join(cells)} |")
        )
    head = f"| folder | latents | {' | '.join(COLUMNS)} | labels | reads |\n|---|---|{'---|' * (len(COLUMNS) + 2)}"
    most = max({place for place, _, _ in rows}, key=lambda name: sum(name == place for place, _, _ in rows))
    return "\n".join([head, *(row for _, _, row in sorted(rows, key=lambda r: (r[0] != most, *r)))])


def labelled(run: Path) -> float:
    """Share of the latents that fire whose label has an F1 above ``POOR`` on contexts it was not chosen on."""
    index = pq.read_table(run / "features" / "features.parquet", columns=["count", "label_score"])
    scores = index.filter(pc.field("count") > 0)["label_score"]
    return pc.sum(pc.fill_null(pc.greater(scores, POOR), fill_value=False)).as_py() / len(scores)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")

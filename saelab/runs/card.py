"""The model card of a run: what it is, its metrics, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab.errors import UserError, damaged
from saelab.evaluation.report import control_rows
from saelab.interop.reading import read_json
from saelab.layout import EVALUATION
from saelab.runs.run import Run
from saelab.training.fitting import ROLLED


def model_card(run: Run, repo: str | None = None, path: str | None = None) -> str:
    """The card of a run folder, with the code that loads it from ``path`` in the hub repository ``repo``, or from the
    folder.

    Raises UserError for an SAE of another tool, whose files do not record enough.
    """
    if run.path is None or run.is_foreign or "saelab" not in run.recorded:
        raise UserError(f"{run.path} is not a run folder; convert it first: saelab convert SAE RUN --to saelab")
    path = path or run.recorded.get("hook_name")
    if repo is None or not path:
        name = run.path.resolve().name
        calls = f'saelab.load("{name}")', f'SAE.load_from_disk("{name}")'
    else:
        calls = f'saelab.from_pretrained("{repo}", "{path}")', f'SAE.from_pretrained("{repo}", "{path}")'
    return _text(repo or run.path.resolve().name, calls, run.config, _measured(run.path / EVALUATION))


def _text(title: str, calls: tuple[str, str], config: Mapping[str, Any], measured: str) -> str:
    metadata = config["metadata"]
    own = metadata["saelab"]["config"]
    d_out = f", d_out {own['d_out']}" if "d_out" in own else ""
    kind = "transcoder" if d_out else "sparse autoencoder"
    rolled, passes = metadata.get(ROLLED), metadata.get("train", {}).get("epochs")
    rows = [
        ("variant", metadata["saelab"]["variant"]),
        ("language model", metadata.get("model_name")),
        ("passes over the text", passes if rolled is None else None),
        ("trained on", None if rolled is None else _streamed(rolled)),
        ("hook", metadata.get("hook_name")),
        ("reconstructs", metadata.get("hook_name_out")),
        ("widths", f"d_in {config['d_in']}, d_sae {config['d_sae']}{d_out}"),
        ("text", metadata.get("dataset_path")),
        ("context length", metadata.get("context_size")),
        ("saelab", metadata.get("saelab_version")),
    ]
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    return f"""---
library_name: saelens
tags: [saelens, saelab, {kind.replace(" ", "-")}]
---
# {title}

A {kind} trained with saelab.

| | |
|---|---|
{facts}
{measured}
## Load it

```python
import saelab

sae = {calls[0]}
```

In SAELens, where it has the architecture (`{config["architecture"]}`):

```python
from sae_lens import SAE

sae = {calls[1]}
```
"""


def _streamed(rolled: Mapping[str, Any]) -> str:
    return (
        f"{rolled['tokens']:,} activations, harvested meanwhile and shuffled over {rolled['window_tokens']:,} tokens; "
        f"scale and thresholds from {rolled['sample_rows']:,} others of the same text"
    )


def _measured(file: Path) -> str:
    if not file.is_file():
        return "\nNot evaluated yet.\n"
    with damaged(file, "evaluate the run again"):
        return _metrics(read_json(file))


def _metrics(evaluation: Mapping[str, Any]) -> str:
    split = evaluation["settings"]["split"].replace("_", "-")
    window = evaluation["density_histogram"]["tokens"]
    documents = evaluation["settings"].get("documents")  # 0.1.0 resampled contexts
    over = "" if documents is None else f" Intervals resample the {documents:,} documents."
    lines = [
        f"\n## Metrics\n\nOn the {split} split.{over} "
        f"Shares of latents are counted over a window of {window:,} tokens.\n",
        "| metric | value | 95 % interval | measured on |",
        "|---|---|---|---|",
    ]
    for name, entry in evaluation["metrics"].items():
        low, high = entry["low"], entry["high"]
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"| {name} | {entry['value']:.4g} | {interval} | {entry['n']:,} {entry['unit']}s |")
    return "\n".join([*lines, *_controls(evaluation)]) + "\n"


def _controls(evaluation: Mapping[str, Any]) -> list[str]:
    """Every number beside those of its controls; where none were measured, how to have them."""
    controls = evaluation.get("controls")
    if not controls:
        return ["", "No controls were measured (`saelab evaluate --controls`)."]
    names = [name for name, found in controls.items() if "cannot" not in found]
    head = " | ".join(["", "SAE", *(name.replace("_", " ") for name in names)])
    lines = ["", "## Controls", "", "What dictionaries reach that have learned less, or nothing:", ""]
    lines += [f"- {name.replace('_', ' ')}: {f.get('cannot') or f['what']}" for name, f in controls.items()]
    lines += ["", f"| {head} |", f"|---|---|{'---|' * len(names)}"]
    for row in control_rows(evaluation):
        cells = [f"{row.controls[name]:.4g}" if name in row.controls else "" for name in names]
        lines.append(f"| {row.name} | {row.value:.4g} | {' | '.join(cells)} |")
    return lines

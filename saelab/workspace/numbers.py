"""The numbers of a run with their provenance: formula, tokens, seed, command. A number without one is not shown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import UserError, damaged
from saelab.layout import EVALUATION, METRICS
from saelab.lm.hook_names import any_layer, layer_of
from saelab.runs import Run
from saelab.workspace.commands import evaluate_command, train_command
from saelab.workspace.condition import damage, state

FORMULAS = {
    "l0": "mean number of latents with a non-zero value per token",
    "fvu": "Σ‖x − x̂‖² / Σ‖x − μ‖²",
    "ce_recovered": "(CE ablated − CE with the SAE) / (CE ablated − CE clean)",
    "dead": "share of latents that never fired in the window",
}
# our name -> the metric's in evaluation.json
EVALUATED = {"l0": "l0", "fvu": "fvu", "ce_recovered": "ce_loss_recovered_zero", "dead": "dead_fraction"}
TITLES = {"l0": "L0", "fvu": "FVU", "ce_recovered": "CE recovered", "dead": "dead"}


@dataclass(frozen=True)
class Number:
    """One number and what is needed to compute it again."""

    name: str
    value: float
    formula: str
    tokens: int | None
    seed: int | None
    source: str
    """Where it was measured: held-out evaluation, or the last training batch."""
    command: str
    low: float | None = None
    high: float | None = None
    held_out: bool = False
    """Whether it was measured on rows that the SAE was not trained on."""

    def text(self) -> str:
        """The value as it is written in the app: L0 with one decimal, shares in per cent, FVU with four digits."""
        if self.name == "l0":
            return f"{self.value:,.1f}"
        return f"{self.value:.1%}" if self.name in {"dead", "ce_recovered"} else f"{self.value:.4f}"

    def where(self) -> str:
        """The sample in a word: ``held-out``, ``train`` or ``all`` for an evaluation, else ``training batch``."""
        return self.source.removesuffix(" split").removeprefix("last ")

    def provenance(self) -> str:
        """One line: formula, tokens, seed, command."""
        return f"{self.sample()} · {self.command}"

    def sample(self) -> str:
        """One line: formula, tokens, seed, interval."""
        sample = [self.source]
        sample += [] if self.tokens is None else [f"{self.tokens:,} tokens"]
        sample += [] if self.seed is None else [f"seed {self.seed}"]
        interval = "" if self.low is None else f" · 95 % interval {self.low:.4g} to {self.high:.4g}"
        return f"{self.formula} · {', '.join(sample)}{interval}"


def numbers(run: Run) -> dict[str, Number]:
    """The run's L0, FVU, CE recovered and dead share: from ``evaluation.json`` where it exists, else from training."""
    where = Path() if run.path is None else run.path
    with damaged(where / METRICS, "remove it or train again"):
        found = _training(run)
    with damaged(where / EVALUATION, "evaluate the run again"):
        found.update(_evaluation(run))
    return found


def summary(run: Run) -> dict[str, Any]:
    """One row of the overview: plain values, ``None`` where a number was never measured or cannot be read."""
    row: dict[str, Any] = {"run": run.name, "state": state(run), "damaged": damage(run) is not None}
    if "error" in run.config:
        return row
    try:
        found = numbers(run)
    except (UserError, OSError) as error:
        return {**row, "state": str(error), "damaged": True}
    return {
        **row,
        "layer": layer(run),
        "place": re.sub(r"\S+?\.\d+\.", "", place(run)),
        "variant": run.variant,
        "d_sae": run.d_sae,
        "k": run.settings.get("k"),
        **{name: found[name].value if name in found else None for name in TITLES},
        "measured": found["fvu"].where() if "fvu" in found else None,
        "step": run.last_step.get("step"),
        "index": run.has_index,
    }


def _training(run: Run) -> dict[str, Number]:
    step = run.last_step
    train = run.metadata.get("train") or {}
    d_sae = run.d_sae
    values = {"l0": step.get("l0"), "fvu": step.get("fvu")}
    if d_sae and step.get("dead") is not None:
        values["dead"] = step["dead"] / d_sae
    window = train.get("dead_after")
    formulas = {**FORMULAS, "dead": f"share of latents silent for {window:,} tokens" if window else FORMULAS["dead"]}
    return {
        name: Number(
            name=name,
            value=value,
            formula=formulas[name],
            tokens=step.get("tokens") if name == "dead" else train.get("batch_size"),
            seed=train.get("seed"),
            source="last training batch" if name != "dead" else "whole training run so far",
            command=train_command(run) or "another tool's training",
        )
        for name, value in values.items()
        if value is not None
    }


def _evaluation(run: Run) -> dict[str, Number]:
    metrics, settings = run.evaluation.get("metrics") or {}, run.evaluation.get("settings") or {}
    found = {}
    for name, key in EVALUATED.items():
        row = metrics.get(key)
        if not row or row.get("value") is None:
            continue
        split = settings.get("split", "held_out")
        found[name] = Number(
            name=name,
            value=row["value"],
            formula=(row.get("formula") or FORMULAS[name]) + _meant(run, name, settings),
            tokens=row.get("n") if row.get("unit") == "token" else None,
            seed=settings.get("seed"),
            source=f"{split} split".replace("_", "-"),
            held_out=split == "held_out",
            command=evaluate_command(run),
            low=row.get("low"),
            high=row.get("high"),
        )
    return found


def _meant(run: Run, name: str, settings: dict[str, Any]) -> str:
    """What the formula of an evaluation does not say: which rows are in the window of dead latents, and what x is."""
    rows = settings.get("density_tokens")
    if name == "dead" and rows and settings.get("split", "held_out") == "held_out":
        return f", up to {rows:,} of them training rows"
    target = run.metadata.get("hook_name_out")
    return f", x: {target}, which the transcoder reconstructs" if name == "fvu" and target else ""


def layer(run: Run) -> int | None:
    """The layer that a run writes to; None where its hook point has none, or is not known."""
    try:
        name = run.metadata.get("hook_name_out") or run.metadata.get("hook_name") or ""
    except (UserError, OSError):
        return None
    return layer_of(name)


def place(run: Run) -> str:
    """The hook point that a run reads, and for a transcoder the one it writes to; empty where they are not known."""
    try:
        names = [run.metadata.get(key) for key in ("hook_name", "hook_name_out")]
    except (UserError, OSError):
        return ""
    return " → ".join(name for name in names if name)


def model_and_place(run: Run) -> tuple[str, str]:
    """What must be the same in two runs whose numbers are compared; empty where it is not known or cannot be read."""
    try:
        return run.model_name or "", place(run)
    except (UserError, OSError):
        return "", ""


class Point(NamedTuple):
    """One SAE in a chart of fidelity against sparsity, or against depth."""

    x: float  # L0, or the layer
    value: float
    text: str
    """Provenance as safe HTML."""
    low: float | None = None
    high: float | None = None
    held_out: bool = True


def pareto_points(runs: Iterable[Run], fidelity: str, training: bool = False) -> dict[str, list[Point]]:
    """What :func:`saelab.viz.pareto` draws: for each variant the SAEs that were measured on held-out rows.

    ``training`` adds those of which only numbers of training rows are known. They cannot be compared with the others:
    an SAE fits the rows it was trained on better. Runs without weights, or with damaged files, are left out. A variant
    of several widths is a series for each of them, and so is one of several models or places: a line between two widths
    or two places is not a trade-off.
    """
    known = [(run, *pair) for run in runs if run.has_weights and (pair := _pair(run, fidelity)) is not None]
    known = [row for row in known if training or (row[1].held_out and row[2].held_out)]
    widths: dict[str, set[int | None]] = {}
    for run, *_ in known:
        widths.setdefault(run.variant, set()).add(run.d_sae)
    places = {model_and_place(run) for run, *_ in known}
    models = {model for model, _ in places}
    points: dict[str, list[Point]] = {}
    for run, l0, number in known:
        series = run.variant if len(widths[run.variant]) == 1 else f"{run.variant} {run.d_sae or '?'}"
        if len(places) > 1:
            model, point = model_and_place(run)
            series = " ".join([series, *([model or "?"] if len(models) > 1 else []), point or "?"])
        points.setdefault(series, []).append(_point(run, l0, number, l0.value))
    return points


def depth_points(runs: Iterable[Run], fidelity: str, training: bool = False) -> dict[str, list[Point]]:
    """What :func:`saelab.viz.by_layer` draws: the same SAEs by layer, a series for those that differ in nothing else.

    That is the variant, its width, the latents per token that were asked for, the model, and the point of the layer.
    Those of a single layer are left out.
    """
    points: dict[str, list[Point]] = {}
    runs = list(runs)
    several = len({model_and_place(run)[0] for run in runs}) > 1
    for run in runs:
        depth, pair = layer(run), _pair(run, fidelity) if run.has_weights else None
        if depth is None or pair is None or not (training or (pair[0].held_out and pair[1].held_out)):
            continue
        point = any_layer(run.metadata.get("hook_name_out") or run.metadata["hook_name"])
        asked = next((run.settings[key] for key in ("k", "n_steps", "l0") if run.settings.get(key)), None)
        model = f" {model_and_place(run)[0] or '?'}" if several else ""
        series = depth_series(run.variant, run.d_sae, asked, f"{model} {point}")
        points.setdefault(series, []).append(_point(run, *pair, depth))
    return {series: found for series, found in points.items() if len({point.x for point in found}) > 1}


def depth_series(variant: str, d_sae: int | None, asked: float | None, rest: str) -> str:
    """The name of a series over layers: variant, width, the latents per token that were asked for, and ``rest``."""
    l0 = "" if asked is None else f" L0 {asked:g}"
    return f"{variant} {d_sae or '?'}{l0}{rest}"


def _point(run: Run, l0: Number, number: Number, x: float) -> Point:
    lines = [f"<b>{html.escape(run.name, quote=False)}</b>"]
    for found in (l0, number):
        lines.append(f"{TITLES[found.name]} = {found.text()}")
        lines += [html.escape(part, quote=False) for part in found.provenance().split(" · ")]
    return Point(x, number.value, "<br>".join(lines), number.low, number.high, l0.held_out and number.held_out)


def _pair(run: Run, fidelity: str) -> tuple[Number, Number] | None:
    """L0 and a fidelity of a run; None where one is unknown or the run's files cannot be read."""
    try:
        found = numbers(run)
    except (UserError, OSError):
        return None
    return (found["l0"], found[fidelity]) if "l0" in found and fidelity in found else None

"""A folder of runs and caches, as the app and the notebooks show it."""

from saelab.runs.metrics_log import measured, read_metrics, series, thin
from saelab.workspace.commands import evaluate_command, index_command, steer_eval_command, train_command
from saelab.workspace.condition import Progress, damage, progress
from saelab.workspace.numbers import (
    FORMULAS,
    TITLES,
    Number,
    depth_points,
    layer,
    model_and_place,
    numbers,
    pareto_points,
    place,
    summary,
)
from saelab.workspace.scan import Workspace

__all__ = [
    "FORMULAS",
    "TITLES",
    "Number",
    "Progress",
    "Workspace",
    "damage",
    "depth_points",
    "evaluate_command",
    "index_command",
    "layer",
    "measured",
    "model_and_place",
    "numbers",
    "pareto_points",
    "place",
    "progress",
    "read_metrics",
    "series",
    "steer_eval_command",
    "summary",
    "thin",
    "train_command",
]

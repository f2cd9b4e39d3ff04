"""Checkpoints of a run that is under way: weights and training state of one step, in one folder.

Tensors go by name, in the shapes of the parameters they belong to (``W_dec [d_sae, d_in]``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import damaged
from saelab.files import sync, write_json, write_tensors
from saelab.layout import CHECKPOINTS, EXTRA, TRAIN_SCALARS, TRAIN_STATE, WEIGHTS
from saelab.sae import SAE
from saelab.sae.weights import read_state, save_sae

# Names under which the files of a run's or a sweep's folder are written: by one process, and by many together.
UNFINISHED = (".*.json.*", ".*.safetensors.*", ".*.parquet.*", ".*.html.*", f".{WEIGHTS}", f".{EXTRA}")


def save_step(
    folder: Path | str,
    step: int,
    sae: SAE,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Make ``folder/checkpoints/step_NNNNNNNN`` from a folded SAE and its training state; replaces older ones."""
    if step_path(folder, step).exists():
        return
    unfinished = begin_step(folder, step)
    save_sae(sae, unfinished, metadata)
    write_tensors(unfinished / TRAIN_STATE, tensors)
    write_json(unfinished / TRAIN_SCALARS, dict(scalars))
    commit_step(folder, step)


def step_path(folder: Path | str, step: int) -> Path:
    """The checkpoint of a step."""
    return Path(folder) / CHECKPOINTS / f"step_{step:08d}"


def unfinished_path(folder: Path | str, step: int) -> Path:
    """Where the checkpoint of a step is written before it has its name."""
    final = step_path(folder, step)
    return final.with_name(f".{final.name}")


def begin_step(folder: Path | str, step: int) -> Path:
    """An empty folder to write a checkpoint's files into; :func:`commit_step` makes it the checkpoint."""
    unfinished = unfinished_path(folder, step)
    # What a kill left behind has no business here any more: only one run writes a run folder.
    for leftover in unfinished.parent.glob(".step_*"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)
    return unfinished


def commit_step(folder: Path | str, step: int) -> None:
    """Make the files written since :func:`begin_step` the checkpoint, in one rename, and remove older ones."""
    final, unfinished = step_path(folder, step), unfinished_path(folder, step)
    for path in (*unfinished.iterdir(), unfinished):
        sync(path)
    unfinished.rename(final)
    sync(final.parent)
    for older in final.parent.glob("step_*"):
        if older != final:
            shutil.rmtree(older)


def latest_step(folder: Path | str) -> Path | None:
    """The newest checkpoint of a run that is under way, or None."""
    return max((Path(folder) / CHECKPOINTS).glob("step_*"), default=None)


def number_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def load_step(
    path: Path, sae: SAE, load: Callable[[Path], dict[str, Tensor]] = load_file
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, tensors of the training state, and its scalars, as :func:`save_step` got them.

    ``load`` reads one file of tensors: all of them, or the slices that a process holds.
    """
    with damaged(path, "remove it and start the run again", OSError, SafetensorError, RuntimeError):
        return read_state(path, sae, load), load(path / TRAIN_STATE), json.loads((path / TRAIN_SCALARS).read_bytes())


def remove_steps(folder: Path | str) -> None:
    """Remove the checkpoints of a run that has finished."""
    shutil.rmtree(Path(folder) / CHECKPOINTS, ignore_errors=True)


def remove_leftovers(folder: Path | str) -> None:
    """Remove what a killed process left half-written in a run folder; only one run writes there."""
    for pattern in UNFINISHED:
        for path in Path(folder).glob(pattern):
            path.unlink()

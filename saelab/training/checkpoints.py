"""Checkpoints of a run in training: weights and training state of one step, in one folder.

They are written by one process, or by many that hold the latents in shards (:class:`Store`). Tensors have names, and
the shapes of the parameters that they belong to (``W_dec [d_sae, d_in]``).
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.distributed import Parallel
from saelab.distributed.slices import read_slices, split_dims, write_sharded
from saelab.errors import UserError, damaged
from saelab.files import sync, write_json, write_tensors
from saelab.layout import CHECKPOINTS, CONFIG, EXTRA, TRAIN_SCALARS, TRAIN_STATE, WEIGHTS
from saelab.sae import SAE
from saelab.sae.weights import configuration, read_state, save, save_config, saved_tensors
from saelab.training.state import TrainState

AGREED = 50  # steps after which several processes agree on whether a checkpoint is due


@dataclass(frozen=True)
class Snapshot:
    """Everything in a checkpoint, in the memory of the CPU, so that it can be written while the training goes on."""

    step: int
    weights: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]  # weights that go into a second file
    tensors: Mapping[str, Tensor]  # of the training state
    scalars: Mapping[str, Any]
    configuration: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        step: int,
        sae: SAE,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
    ) -> Snapshot:
        """Copies of a folded SAE and its training state."""
        weights, rest = saved_tensors(sae)
        return cls(step, _copies(weights), _copies(rest), _copies(tensors), dict(scalars), configuration(sae, metadata))

    def write(self, folder: Path | str) -> None:
        """Make ``folder/checkpoints/step_NNNNNNNN``, in place of older ones."""
        if step_path(folder, self.step).exists():
            return
        unfinished = begin_step(folder, self.step)
        try:
            write_tensors(unfinished / WEIGHTS, self.weights)
            if self.rest:
                write_tensors(unfinished / EXTRA, self.rest)
            write_json(unfinished / CONFIG, dict(self.configuration))
            write_tensors(unfinished / TRAIN_STATE, self.tensors)
            write_json(unfinished / TRAIN_SCALARS, dict(self.scalars))
            commit_step(folder, self.step)
        except OSError:  # a full disk: what was written of it only takes space
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


class Writer:
    """Writes one snapshot at a time in a thread. What went wrong there is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, snapshot: Snapshot, folder: Path) -> None:
        """Begin to write; waits for the snapshot before."""
        self.wait()

        def work() -> None:
            try:
                snapshot.write(folder)
            except BaseException as error:
                self._error = error

        # No daemon: where the program ends without waiting, the interpreter still lets it complete the checkpoint.
        self._thread = threading.Thread(target=work, name="saelab-checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        self.finish()
        self.check()

    def finish(self) -> None:
        """:meth:`wait` where another error is on its way: what went wrong in the thread is kept to itself."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


@dataclass(frozen=True)
class Interval:
    """When checkpoints are written: every so many steps, or else every so many minutes."""

    steps: int | None = None
    minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"checkpoint_steps={self.steps} must be at least 1")
        if not self.minutes > 0:
            raise UserError(f"checkpoint_minutes={self.minutes} must be above 0")

    def clock(self, parallel: Parallel) -> Callable[[int], bool]:
        """A function that is called after every step with its number: whether a checkpoint is due.

        Of several processes the main one looks at the clock, and all are told now and then, so that they agree.
        """
        last = time.monotonic()

        def due(step: int) -> bool:
            nonlocal last
            if self.steps is not None:
                return step % self.steps == 0
            if parallel.size > 1 and step % AGREED:
                return False
            if not parallel.any(parallel.is_main and time.monotonic() - last >= 60 * self.minutes):
                return False
            last = time.monotonic()
            return True

        return due


def step_path(folder: Path | str, step: int) -> Path:
    """The checkpoint of a step."""
    return Path(folder) / CHECKPOINTS / f"step_{step:08d}"


def unfinished_path(folder: Path | str, step: int) -> Path:
    """The temporary folder in which the checkpoint of a step is written."""
    final = step_path(folder, step)
    return final.with_name(f".{final.name}")


def begin_step(folder: Path | str, step: int) -> Path:
    """An empty folder to write a checkpoint's files into; :func:`commit_step` makes it the checkpoint."""
    unfinished = unfinished_path(folder, step)
    # Remove what a killed run left: only one run writes a run folder.
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
    """The newest checkpoint of a run in training, or None."""
    return max((Path(folder) / CHECKPOINTS).glob("step_*"), default=None)


def number_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def load_step(
    path: Path, sae: SAE, load: Callable[[Path], dict[str, Tensor]] = load_file
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, tensors of the training state, and its scalars, as given to :meth:`Snapshot.of`.

    ``load`` reads one file of tensors: all of them, or the slices that a process holds.
    """
    with damaged(path, "remove it and start the run again", OSError, SafetensorError, RuntimeError):
        return read_state(path, sae, load), load(path / TRAIN_STATE), json.loads((path / TRAIN_SCALARS).read_bytes())


def remove_steps(folder: Path | str) -> None:
    """Remove the checkpoints of a run that has finished."""
    shutil.rmtree(Path(folder) / CHECKPOINTS, ignore_errors=True)


@dataclass(frozen=True)
class Store:
    """The run folder of an SAE. ``sae`` is this process's shard of ``whole``, or ``whole`` itself."""

    folder: Path
    sae: SAE
    whole: SAE
    metadata: Mapping[str, Any]
    parallel: Parallel
    writer: Writer = field(default_factory=Writer)

    @cached_property
    def dims(self) -> dict[str, int]:
        """The tensors that are split over the dictionary ranks: those with another shape in the whole SAE."""
        shard, whole = ({**sae.state_dict(), **saved_tensors(sae)[0]} for sae in (self.sae, self.whole))
        return split_dims(shard, whole)

    def save_step(self, state: TrainState, wait: bool = True) -> None:
        """Write a checkpoint between two steps; every process calls it.

        Without ``wait`` it is copied now and written while the training goes on, unless the latents are in shards.
        """
        self.writer.wait()
        state.fold(self.sae)
        tensors, scalars = state.tensors(self.sae), state.scalars()
        if self.parallel.dict_size == 1:
            if self.parallel.is_main and not step_path(self.folder, state.step).exists():
                self.writer.start(Snapshot.of(state.step, self.sae, tensors, scalars, self.metadata), self.folder)
            if wait:
                self.writer.wait()
            self.parallel.barrier()
        elif not step_path(self.folder, state.step).exists():
            self._save_sharded_step(state.step, tensors, scalars)
        state.unfold(self.sae)

    def _save_sharded_step(self, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        unfinished = unfinished_path(self.folder, step)
        if self.parallel.is_main:
            begin_step(self.folder, step)
            save_config(self.whole, unfinished, self.metadata)
            write_json(unfinished / TRAIN_SCALARS, scalars)
        self.parallel.barrier()
        self._write_weights(unfinished)
        write_sharded(unfinished / TRAIN_STATE, tensors, self.dims, self.parallel)
        if self.parallel.is_main:
            commit_step(self.folder, step)
        self.parallel.barrier()

    def restore(self) -> TrainState | None:
        """Load the newest checkpoint into ``sae`` and return its state; None if there is none."""
        path = latest_step(self.folder)
        if path is None:
            return None
        weights, tensors, scalars = load_step(path, self.sae, lambda file: read_slices(file, self.dims, self.parallel))
        self.sae.load_state_dict(weights)
        with damaged(path, "remove it and start the run again"):
            return TrainState.restore(self.sae, tensors, scalars)

    def save_final(self) -> None:
        """Write the folded SAE in place of the checkpoints; every process calls it."""
        self.writer.wait()
        split = self.parallel.dict_size > 1
        if split:
            self._write_weights(self.folder)
        if self.parallel.is_main:
            if split:
                save_config(self.whole, self.folder, self.metadata)
            else:
                save(self.sae, self.folder, self.metadata)
            remove_steps(self.folder)
        self.parallel.barrier()

    def _write_weights(self, folder: Path) -> None:
        weights, rest = saved_tensors(self.sae)
        write_sharded(folder / WEIGHTS, weights, self.dims, self.parallel)
        if rest:
            write_sharded(folder / EXTRA, rest, self.dims, self.parallel)

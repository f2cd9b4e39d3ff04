"""Checkpoints of a run in training: weights and training state of one step, in one folder.

They are written by one process into one file each for weights and state, or by many, each into a file of its own
(:class:`Store`). Either is read by any number of processes. Tensors have names, and the shapes of the parameters that
they belong to (``W_dec [d_sae, d_in]``).
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.distributed import Parallel, Poll
from saelab.distributed.checkpoint import Layout, export, split_dims, write
from saelab.distributed.engine import Engine
from saelab.errors import UserError, damaged
from saelab.files import sync, write_json, write_tensors
from saelab.layout import CHECKPOINTS, CONFIG, EXTRA, TRAIN_SCALARS, TRAIN_STATE, WEIGHTS
from saelab.sae import SAE
from saelab.sae.parts import in_parts, owner, read_parts
from saelab.sae.weights import configuration, read_state, save, save_config, saved_tensors
from saelab.training.state import TrainState

SINCE = "tokens_since_fired"


@dataclass(frozen=True)
class Snapshot:
    """What one process alone writes: a whole checkpoint in the memory of the CPU, while the training goes on."""

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


@dataclass(frozen=True)
class Portion:
    """What one of several processes holds of a checkpoint, in the memory of the CPU."""

    step: int
    tensors: Mapping[str, Tensor]  # placed, of weights and training state together
    scalars: Mapping[str, Any]
    configuration: Mapping[str, Any]
    parallel: Parallel

    def write(self, folder: Path) -> None:
        """Make ``folder/checkpoints/step_NNNNNNNN`` together with the other processes."""
        main = self.parallel.is_main
        unfinished = begin_step(folder, self.step) if main else unfinished_path(folder, self.step)
        self.parallel.barrier()
        write(self.tensors, unfinished, self.parallel)
        if main:
            write_json(unfinished / CONFIG, dict(self.configuration))
            write_json(unfinished / TRAIN_SCALARS, dict(self.scalars))
            commit_step(folder, self.step)


class Writer:
    """Writes one snapshot at a time in a thread. What went wrong there is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.begun: int | None = None  # the step of the last snapshot

    def start(self, snapshot: Snapshot | Portion, folder: Path) -> None:
        """Begin to write; waits for the snapshot before."""
        self.wait()
        self.begun = snapshot.step

        def work() -> None:
            try:
                snapshot.write(folder)
            except BaseException as error:
                self._error = error

        # No daemon: where the program ends without waiting, the interpreter still lets it complete the checkpoint. Of
        # several processes one may be gone, which the others must not wait for.
        alone = isinstance(snapshot, Snapshot)
        self._thread = threading.Thread(target=work, name="saelab-checkpoint", daemon=not alone)
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

    def abandon(self) -> None:
        """Wait no more for what is being written: another process is gone."""
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
        last, poll = time.monotonic(), Poll(parallel)

        def due(step: int) -> bool:
            nonlocal last
            if self.steps is not None:
                return step % self.steps == 0
            if not poll(parallel.is_main and time.monotonic() - last >= 60 * self.minutes):
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
    path: Path, sae: SAE, layout: Layout | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, tensors of the training state, and its scalars, as given to :meth:`Snapshot.of`.

    ``layout`` says which parts of the tensors a process holds, where there are several.
    """
    with damaged(path, "remove it and start the run again", OSError, SafetensorError, RuntimeError):
        scalars = json.loads((path / TRAIN_SCALARS).read_bytes())
        if layout is None and not in_parts(path):
            return read_state(path, sae), load_file(path / TRAIN_STATE), scalars
        own = sae.state_dict()
        shapes = {name: tensor.shape for name, tensor in own.items()} | {SINCE: torch.Size([sae.d_sae])}
        found = read_parts(path, lambda name: shapes.get(owner(name)), None if layout is None else layout.place)
        weights = {name: found.pop(name) for name in own if name in found}
        return weights, found, scalars


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

    def __post_init__(self) -> None:
        if self.parallel.size > 1:
            _ = self.layout  # before data ranks divide the parameters further

    @cached_property
    def layout(self) -> Layout:
        """How the tensors lie on dictionary ranks: those with another shape in the whole SAE are divided."""
        shard, whole = ({**sae.state_dict(), **saved_tensors(sae)[0]} for sae in (self.sae, self.whole))
        dims, shapes = split_dims(shard, whole), {name: tensor.shape for name, tensor in whole.items()}
        shapes |= {SINCE: torch.Size([self.whole.d_sae])}
        return Layout(shapes, self.parallel, dims | ({SINCE: 0} if self.parallel.dict_size > 1 else {}))

    def save_step(self, state: TrainState, wait: bool = True) -> None:
        """Write a checkpoint between two steps; every process calls it.

        Without ``wait`` it is copied now and written while the training goes on.
        """
        self.writer.wait()
        if self.writer.begun != state.step:
            state.fold(self.sae)
            self.writer.start(self._snapshot(state), self.folder)
            state.unfold(self.sae)
        if wait:
            self.writer.wait()

    def _snapshot(self, state: TrainState) -> Snapshot | Portion:
        tensors, scalars = state.tensors(self.sae), state.scalars()
        if self.parallel.size == 1:
            return Snapshot.of(state.step, self.sae, tensors, scalars, self.metadata)
        placed = self._placed({**self.sae.state_dict(), **tensors}, state.engine)
        return Portion(state.step, placed, scalars, configuration(self.whole, self.metadata), self.parallel)

    def _placed(self, tensors: Mapping[str, Tensor], engine: Engine | None = None) -> dict[str, Tensor]:
        """Copies on the CPU that say which parts of the whole tensors they are."""
        plain, layout = {name: _plain_copy(tensor) for name, tensor in tensors.items()}, self._divided(engine)
        return {name: layout.place(name, tensor) for name, tensor in plain.items()}

    def _divided(self, engine: Engine | None) -> Layout:
        """The layout while the parameters are divided over data ranks, too."""
        return self.layout if engine is None else replace(self.layout, by_data=engine.dims)

    def restore(self) -> TrainState | None:
        """Load the newest checkpoint into ``sae`` and return its state; None if there is none."""
        path = latest_step(self.folder)
        if path is None:
            return None
        parallel = self.parallel
        engine = Engine(self.sae, parallel) if parallel.data_size > 1 else None
        weights, tensors, scalars = load_step(path, self.sae, None if parallel.size == 1 else self._divided(engine))
        with damaged(path, "remove it and start the run again", RuntimeError):
            self.sae.load_state_dict(weights)
            state = TrainState.restore(self.sae, tensors, scalars)
        state.engine, self.writer.begun = engine, state.step
        return state

    def save_final(self) -> None:
        """Write the folded SAE in place of the checkpoints; every process calls it."""
        self.writer.wait()
        split = self.parallel.dict_size > 1
        if split:
            weights, rest = saved_tensors(self.sae)
            export(self._placed(weights), self.folder / WEIGHTS, self.parallel)
            if rest:
                export(self._placed(rest), self.folder / EXTRA, self.parallel)
        if self.parallel.is_main:
            if split:
                save_config(self.whole, self.folder, self.metadata)
            else:
                save(self.sae, self.folder, self.metadata)
            remove_steps(self.folder)
        self.parallel.barrier()


def _plain_copy(tensor: Tensor) -> Tensor:
    """A copy in row-major order, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

"""Saving and restoring a run, by one process or by many that hold its latents in shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.distributed import Parallel
from saelab.distributed.slices import read_slices, write_sharded
from saelab.files import write_json
from saelab.layout import EXTRA, TRAIN_SCALARS, TRAIN_STATE, WEIGHTS
from saelab.sae import SAE
from saelab.sae.weights import save_config, save_sae, saved_tensors
from saelab.training.checkpoints import (
    begin_step,
    commit_step,
    latest_step,
    load_step,
    remove_steps,
    save_step,
    step_path,
    unfinished_path,
)
from saelab.training.state import TrainState


@dataclass(frozen=True)
class Store:
    """The run folder of an SAE. ``sae`` is this process' shard of ``whole``, or the same where nothing is split."""

    folder: Path
    sae: SAE
    whole: SAE
    metadata: Mapping[str, Any]
    parallel: Parallel

    def save_step(self, state: TrainState) -> None:
        """Write a checkpoint between two steps; every process calls it."""
        # Ranks must write the same tensors, whether or not their own values came back exactly.
        state.fold(self.sae, keep_all=self.parallel.dict_size > 1)
        tensors, scalars = state.tensors(self.sae), state.scalars()
        if self.parallel.dict_size == 1:
            if self.parallel.is_main:
                save_step(self.folder, state.step, self.sae, tensors, scalars, self.metadata)
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
        write_sharded(unfinished / TRAIN_STATE, tensors, self.parallel)
        if self.parallel.is_main:
            commit_step(self.folder, step)
        self.parallel.barrier()

    def restore(self) -> TrainState | None:
        """Load the newest checkpoint into ``sae`` and return its state; None if there is none."""
        path = latest_step(self.folder)
        if path is None:
            return None
        weights, tensors, scalars = load_step(path, self.sae, lambda file: read_slices(file, self.parallel))
        self.sae.load_state_dict(weights)
        return TrainState.restore(self.sae, tensors, scalars)

    def save_final(self) -> None:
        """Write the folded SAE in place of the checkpoints; every process calls it."""
        split = self.parallel.dict_size > 1
        if split:
            self._write_weights(self.folder)
        if self.parallel.is_main:
            if split:
                save_config(self.whole, self.folder, self.metadata)
            else:
                save_sae(self.sae, self.folder, self.metadata)
            remove_steps(self.folder)
        self.parallel.barrier()

    def _write_weights(self, folder: Path) -> None:
        weights, rest = saved_tensors(self.sae)
        write_sharded(folder / WEIGHTS, weights, self.parallel)
        if rest:
            write_sharded(folder / EXTRA, rest, self.parallel)

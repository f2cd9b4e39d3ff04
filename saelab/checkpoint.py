"""The run folder: weights and configuration in SAELens' layout, the training state beside them.

``sae_weights.safetensors`` + ``cfg.json`` hold the SAE in units of raw activations, readable by SAELens wherever the
architecture exists there; what is ours alone stands under ``metadata``. Nothing is pickled.

While a run is under way its folder has ``checkpoints/step_NNNNNNNN/``: the same two files, usable on their own, and
``train_state.safetensors`` + ``train_state.json`` with everything else the next step depends on. Such a folder is
written under a temporary name, synced and renamed, and only then is its predecessor removed: whenever the process is
killed, the newest ``step_*`` is complete and its weights and state belong together.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab._version import __version__
from saelab.errors import UserError, damaged
from saelab.sae import SAE, restore
from saelab.sae.inference import inference_form

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
EXTRA = "saelab_extra.safetensors"  # running statistics, training thresholds: what SAELens does not know
STATE, STATE_JSON = "train_state.safetensors", "train_state.json"
CHECKPOINTS = "checkpoints"
SAELENS_VERSION = "6.54.12"  # the release whose format is written; SAELens parses by this number


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the old file or the new one, never half of either."""
    _replace(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors atomically."""
    # safetensors refuses the column-major layout of W_enc.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda temporary: save_plain(plain, temporary))


def save_plain(tensors: dict[str, Tensor], path: Path) -> None:
    """``safetensors``' own writer, with an OSError where the system refuses, as from any other writer."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def save_sae(
    sae: SAE, folder: Path | str, metadata: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write weights and configuration. ``metadata`` is provenance: model, hook, cache, seed, command.

    ``dtype`` is that of the matrices on disk (torch.float16 halves the folder), by default their own; biases and
    thresholds keep theirs, and whoever loads the file computes in the configuration's dtype.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, rest = saved_tensors(sae)
    if dtype is not None:
        weights = {name: value.to(dtype) if value.ndim == 2 else value for name, value in weights.items()}
    write_tensors(folder / WEIGHTS, weights)
    if rest:
        write_tensors(folder / EXTRA, rest)
    save_config(sae, folder, metadata)


def saved_tensors(sae: SAE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What goes into the weights' file, and what into the one beside it."""
    form, state = inference_form(sae), sae.state_dict()
    # SAELens accepts its own tensors and no others; what else the variant needs stands in a file of its own.
    weights = form.tensors if form and form.in_saelens else state
    return weights, {name: value for name, value in state.items() if name not in weights}


def save_config(sae: SAE, folder: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the configuration alone, the last file of a finished run; ``sae`` needs no storage."""
    form = inference_form(sae)
    write_json(
        Path(folder) / CONFIG,
        {
            "architecture": form.architecture if form and form.in_saelens else f"saelab_{sae.variant}",
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": sae.config.get("apply_b_dec_to_input", True),
            **(form.config if form else {}),
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                **(metadata or {}),
                "sae_lens_version": SAELENS_VERSION,
                "training_architecture": sae.variant,
                "saelab_version": __version__,
                "saelab": {"variant": sae.variant, "config": sae.config},
            },
        },
    )


def load_config(folder: Path | str) -> dict[str, Any]:
    """The parsed ``cfg.json`` of a run folder."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    with damaged(path, "restore it or train again"):
        content = json.loads(path.read_bytes())
        content.get("metadata", {}).get("saelab")
        return content


def load_metadata(folder: Path | str) -> dict[str, Any]:
    """The provenance of a run: the ``metadata`` block of its configuration."""
    return load_config(folder).get("metadata", {})


def load_sae(folder: Path | str, device: str | torch.device = "cpu") -> SAE:
    """The SAE of a run folder, in eval mode, taking raw activations."""
    ours = load_metadata(folder).get("saelab")
    if ours is None:
        raise UserError(f"{folder} was not written by saelab; load it with saelab.load, or `saelab convert` it first")
    if not (Path(folder) / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; the run did not finish its first save")
    sae = restore(ours["variant"], ours["config"])
    try:
        sae.load_state_dict(read_state(folder, sae))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder} does not hold the SAE that its {CONFIG} describes ({error})") from error
    return sae.to(device).eval()


def read_state(
    folder: Path | str, sae: SAE, load: Callable[[Path], dict[str, Tensor]] = load_file
) -> dict[str, Tensor]:
    """The saved state of ``sae``, from SAELens' file and the one beside it, without what SAELens alone needs."""
    folder = Path(folder)
    saved = load(folder / WEIGHTS)
    if (folder / EXTRA).is_file():
        saved |= load(folder / EXTRA)
    return {name: value for name, value in saved.items() if name in sae.state_dict()}


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
    write_tensors(unfinished / STATE, tensors)
    write_json(unfinished / STATE_JSON, dict(scalars))
    commit_step(folder, step)


def step_path(folder: Path | str, step: int) -> Path:
    """The checkpoint of a step."""
    return Path(folder) / CHECKPOINTS / f"step_{step:08d}"


def begin_step(folder: Path | str, step: int) -> Path:
    """An empty folder to write a checkpoint's files into; :func:`commit_step` makes it the checkpoint."""
    final = step_path(folder, step)
    # What a kill left behind has no business here any more: only one run writes a run folder.
    for leftover in final.parent.glob(".step_*"):
        shutil.rmtree(leftover)
    unfinished = final.with_name(f".{final.name}")
    unfinished.mkdir(parents=True)
    return unfinished


def commit_step(folder: Path | str, step: int) -> None:
    """Make the files written since :func:`begin_step` the checkpoint, in one rename, and remove older ones."""
    final = step_path(folder, step)
    unfinished = final.with_name(f".{final.name}")
    for path in (*unfinished.iterdir(), unfinished):
        _sync(path)
    unfinished.rename(final)
    _sync(final.parent)
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
        return read_state(path, sae, load), load(path / STATE), json.loads((path / STATE_JSON).read_bytes())


def remove_steps(folder: Path | str) -> None:
    """Remove the checkpoints of a run that has finished."""
    shutil.rmtree(Path(folder) / CHECKPOINTS, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(path: Path, write: Any) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Save and load an SAE as a folder: its configuration, and its weights by name (``W_dec [d_sae, d_in]``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab._version import __version__
from saelab.errors import UserError, damaged
from saelab.files import write_json, write_tensors
from saelab.layout import CONFIG, EXTRA, WEIGHTS
from saelab.sae import SAE, restore
from saelab.sae.parts import in_parts, read_parts

SAELENS_VERSION = "6.54.12"  # the release whose format is written; SAELens parses by this number
REMEDY = "restore it or train again"


def save(
    sae: SAE, folder: Path | str, metadata: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write weights and configuration. ``metadata`` is provenance: model, hook, cache, seed, command.

    ``dtype`` is that of the matrices on disk (torch.float16 halves the folder), by default their own; biases and
    thresholds keep theirs. The loaded SAE computes in the dtype of the configuration.
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
    """The tensors for SAELens' weights file, and those for the file beside it."""
    form, state = sae.inference_form(), sae.state_dict()
    # SAELens refuses tensors that it does not know; the other tensors of the variant go into a second file.
    weights = form.tensors if form and form.in_saelens else state
    return weights, {name: value for name, value in state.items() if name not in weights}


def save_config(sae: SAE, folder: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the configuration alone, the last file of a finished run; ``sae`` needs no storage."""
    write_json(Path(folder) / CONFIG, configuration(sae, metadata))


def configuration(sae: SAE, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of ``cfg.json``."""
    form, remarks = sae.inference_form(), sae.remarks()
    return {
        "architecture": form.name if form and form.in_saelens else f"saelab_{sae.variant}",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not sae.transcodes and sae.config.get("apply_b_dec_to_input", True),
        **(form.config if form else {}),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            **(metadata or {}),
            **({"remarks": remarks} if remarks else {}),
            "sae_lens_version": SAELENS_VERSION,
            "training_architecture": sae.variant,
            "saelab_version": __version__,
            "saelab": {"variant": sae.variant, "config": sae.config},
        },
    }


def load_config(folder: Path | str) -> dict[str, Any]:
    """The parsed ``cfg.json`` of a run folder."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}; name the folder of a finished run")
    with damaged(path, REMEDY):
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
    if not (Path(folder) / WEIGHTS).is_file() and not in_parts(folder):
        raise UserError(f"{folder} has no {WEIGHTS}; {REMEDY}")
    with damaged(Path(folder) / CONFIG, REMEDY):
        sae = restore(ours["variant"], ours["config"])
    try:
        sae.load_state_dict(read_state(folder, sae))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} does not hold the SAE that its {CONFIG} describes ({reason}); {REMEDY}") from error
    for name, value in sae.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{folder}: {name} has NaN or infinite entries; {REMEDY}")
    return sae.to(device).eval()


def read_state(
    folder: Path | str, sae: SAE, load: Callable[[Path], dict[str, Tensor]] = load_file
) -> dict[str, Tensor]:
    """The saved state of ``sae``, from SAELens' file and the one beside it, without tensors that only SAELens needs."""
    folder = Path(folder)
    if in_parts(folder):
        return read_parts(folder, {name: tensor.shape for name, tensor in sae.state_dict().items()}.get)
    saved = load(folder / WEIGHTS)
    if (folder / EXTRA).is_file():
        saved |= load(folder / EXTRA)
    return {name: value for name, value in saved.items() if name in sae.state_dict()}


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors of any shape, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

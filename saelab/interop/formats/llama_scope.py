"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch

from saelab.errors import UserError
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import read_json, read_linear, read_tensors


def sniff(path: Path) -> bool:
    """A folder with ``hyperparams.json``."""
    return (path / "hyperparams.json").is_file()


def read(path: Path) -> Foreign:
    """Llama Scope: ``checkpoints/final.safetensors``, one threshold for all latents, inputs scaled to norm sqrt(d)."""
    config = read_json(path / "hyperparams.json")
    file = path / "checkpoints" / "final.safetensors"
    tensors = read_linear(read_tensors(file), file)
    d_in, d_sae = tensors["W_enc"].shape
    try:
        norm = float(config["dataset_average_activation_norm"]["in"])
        threshold = float(config["jump_relu_threshold"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'hyperparams.json'} lacks the threshold or the average norm ({error}); get it again"
        ) from error
    scale = d_in**0.5 / norm
    # Published weights act on scaled inputs; SAELens scales the threshold, so it is stored for raw units times scale.
    return Foreign(
        format="llama_scope",
        architecture="jump_relu",
        threshold=torch.full((d_sae,), threshold * scale),
        subtracts_b_dec=False,
        input_scale=scale,
        metadata={"hook_name": config.get("hook_point_in"), "model_name": "meta-llama/Llama-3.1-8B"},
        **tensors,
    )


register(Format("llama_scope", ("hyperparams.json", "checkpoints/final.safetensors"), sniff, read))

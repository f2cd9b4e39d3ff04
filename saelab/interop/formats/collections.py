"""Published collections: Gemma Scope, Llama Scope, Llamascopium, Qwen Scope, Goodfire; one reader each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.interop.foreign import Foreign
from saelab.interop.formats.linear import d_of, linear, names
from saelab.interop.reading import checked, read_json, read_tensors

GEMMA_FILES = ("params.npz", "params.safetensors")


def sniff_gemma_scope(path: Path) -> bool:
    """``params.npz`` or ``params.safetensors``, or the folder with it."""
    if path.is_dir():
        return any((path / name).is_file() for name in GEMMA_FILES)
    return path.name in GEMMA_FILES and path.is_file()


def read_gemma_scope(path: Path) -> Foreign:
    """Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors``, lower-case names): JumpReLU, nothing subtracted."""
    file = path
    if path.is_dir():
        file = next(path / name for name in GEMMA_FILES if (path / name).is_file())
    raw = {str(name).replace("w_", "W_"): value for name, value in read_tensors(file).items()}
    if "affine_skip_connection" in raw:
        raise UserError(f"{file} is a transcoder; transcoders are out of saelab's scope")
    d_in, d_sae = d_of(raw, "W_enc", file)
    shapes = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    tensors = checked(raw, shapes, file)
    layer = re.search(r"layer_(\d+)", str(file))
    metadata = {"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}
    notes = ["the format has no configuration; the hook is guessed from the path"] if layer else []
    return Foreign(
        "gemma_scope", "jump_relu", subtracts_b_dec=False, metadata=metadata, notes=notes, **_canonical(tensors)
    )


def sniff_llama_scope(path: Path) -> bool:
    """A folder with ``hyperparams.json``."""
    return (path / "hyperparams.json").is_file()


def read_llama_scope(path: Path) -> Foreign:
    """Llama Scope: ``checkpoints/final.safetensors``, one threshold for all latents, inputs scaled to norm sqrt(d)."""
    config = read_json(path / "hyperparams.json")
    file = path / "checkpoints" / "final.safetensors"
    tensors = linear(read_tensors(file), file)
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


def sniff_llamascopium(path: Path) -> bool:
    """``config.json`` beside a file named like SAELens' weights."""
    return (path / "config.json").is_file() and (path / "sae_weights.safetensors").is_file()


def read_llamascopium(path: Path) -> Foreign:
    """Llamascopium: ``W_E b_E W_D b_D`` or ``encoder.*`` in a file named like SAELens' own."""
    config, file = read_json(path / "config.json"), path / "sae_weights.safetensors"
    raw = read_tensors(file)
    renamed = {"W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc", "b_D": "b_dec"}
    if "W_E" in raw:
        raw = {renamed.get(name, name): value for name, value in raw.items()}
        d_in, d_sae = d_of(raw, "W_enc", file)
        shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        tensors = checked(raw, shapes, file)
    else:
        tensors = linear(raw, file)
    act = config.get("act_fn", "relu")
    if act not in {"relu", "jumprelu", "topk"}:
        raise UserError(f"{path}: activation {act!r} has no counterpart here")
    log_threshold = next((raw[name] for name in raw if str(name).endswith("log_jumprelu_threshold")), None)
    return Foreign(
        format="llamascopium",
        architecture={"relu": "relu", "jumprelu": "jump_relu", "topk": "topk"}[act],
        k=config.get("top_k"),
        threshold=log_threshold.float().exp() if act == "jumprelu" and log_threshold is not None else None,
        subtracts_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        metadata={"hook_name": config.get("hook_point_in")},
        notes=["its dataset-wise input scale is not in the folder: right only if it has been folded"],
        **tensors,
    )


def sniff_qwen_scope(path: Path) -> bool:
    """A file ``layerN.sae.pt``."""
    return path.name.endswith(".sae.pt")


def read_qwen_scope(path: Path) -> Foreign:
    """Qwen Scope ``layerN.sae.pt``: both matrices transposed; k stands in the name of the repository (``L0_50``)."""
    raw = read_tensors(path)
    d_sae, d_in = d_of(raw, "W_enc", path)
    shapes = {"W_enc": (d_sae, d_in), "W_dec": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)}
    tensors = checked(raw, shapes, path)
    k, layer = re.search(r"L0_(\d+)", str(path)), re.search(r"layer(\d+)", path.name)
    return Foreign(
        format="qwen_scope",
        architecture="topk",
        W_enc=tensors["W_enc"].T,
        W_dec=tensors["W_dec"].T,
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        k=int(k[1]) if k else None,
        subtracts_b_dec=False,
        metadata={"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {},
    )


def sniff_goodfire(path: Path) -> bool:
    """A torch file with ``encoder_linear.weight``."""
    return path.is_file() and "encoder_linear.weight" in names(path)


def read_goodfire(path: Path) -> Foreign:
    """Goodfire: ``encoder_linear.*``, ``decoder_linear.*``, ReLU, nothing subtracted."""
    raw = {str(name).replace("_linear.", "."): value for name, value in read_tensors(path).items()}
    return Foreign("goodfire", "relu", subtracts_b_dec=False, **linear(raw, path))


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}

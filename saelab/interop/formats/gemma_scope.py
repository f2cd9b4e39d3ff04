"""Gemma Scope 1 and 2: ``params.npz``, or ``params.safetensors`` beside a ``config.json``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saelab.errors import UserError
from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.origin import Origin
from saelab.interop.reading import above_zero, checked, has_tensors, matrix_shape, read_json, read_tensors, split_files
from saelab.lm.norms import BARE

SKIP = "affine_skip_connection"
FILES = ("params.npz", "params.safetensors")
# Where version 2 reads, as Hugging Face modules -> TransformerLens' name. The MLP's output is that after its norm.
HOOKS = {
    "output": "hook_resid_post",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "self_attn.o_proj.input": "attn.hook_z",
}


def sniff(path: Path) -> bool:
    """``params.npz`` or ``params.safetensors``, or the folder with it."""
    if path.is_dir():
        return any(has_tensors(path / name) for name in FILES)
    return path.name in FILES and path.is_file()


def read(path: Path) -> Foreign:
    """Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors``, lower-case names): JumpReLU, nothing subtracted.

    Transcoders of version 1 have the same tensors as SAEs: only the name of their repository tells them apart. They
    read behind the norm of the MLP and write what it adds to the residual stream. Those of version 1 were trained on a
    model with the norm's gain folded into the MLP (Lieberum et al., 2024, arXiv 2408.05147), so they read without it.
    """
    file = path
    if path.is_dir():
        file = next(path / name for name in FILES if has_tensors(path / name))
    config_file = file.parent / "config.json"
    config = read_json(config_file) if file.suffix == ".safetensors" and config_file.is_file() else {}
    raw = {str(name).replace("w_", "W_"): value for name, value in read_tensors(file).items()}
    transcodes = _transcodes(config, file)
    kind.check_tensors(file, raw, (SKIP,) if transcodes else ())
    metadata = _metadata(config, file, transcodes)
    d_in, d_sae = matrix_shape(raw, "W_enc", file)
    shapes = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
        **({SKIP: (d_in, d_in)} if transcodes and SKIP in raw else {}),
    }
    tensors = checked(raw, shapes, file)
    tensors["threshold"] = above_zero(tensors["threshold"])
    if unused := sorted(raw.keys() - shapes.keys()):
        raise UserError(f"{file} holds {', '.join(unused)}, which no SAE of Gemma Scope has; get the file again")
    if config.get("hf_hook_point_in") and "hook_name" not in metadata:
        raise UserError(f"{file} reads {config['hf_hook_point_in']}, which is no hook point of an SAE known here")
    skip = tensors.pop(SKIP, None)  # [d_in, d_out]
    about = {"subtracts_b_dec": False, "metadata": metadata, "transcodes": transcodes}
    foreign = Foreign("gemma_scope", "jump_relu", W_skip=None if skip is None else skip.T, **about, **tensors)
    if "embedding" in Origin.of(file).inside.split("/"):
        # Trained on rows of the embedding matrix; Gemma multiplies them by sqrt(d_model) before the first block.
        foreign.input_scale = d_in**-0.5
        foreign.notes.append(
            "trained on embeddings before Gemma multiplies them by sqrt(d_model); the factor is folded in"
        )
    return foreign


def _transcodes(config: dict[str, Any], file: Path) -> bool:
    """Whether it is a transcoder, by the type and the hook points of version 2's configuration, or by its name."""
    ends = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    by_hooks = bool(ends[0] and ends[1] and ends[0] != ends[1])
    return config.get("type") == "transcoder" or by_hooks or (not config and kind.says_transcoder(file))


def _metadata(config: dict[str, Any], file: Path, transcodes: bool) -> dict[str, Any]:
    """Model and hook point from version 2's configuration; UserError for a crosscoder."""
    if not transcodes:
        kind.check_type(file, config.get("type"), "type")
    hook_in = config.get("hf_hook_point_in")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{file}: architecture {config['architecture']!r} has no counterpart here; only jump_relu has")
    match = re.fullmatch(r".*layers\.(\d+)\.(.+)", str(hook_in))
    metadata: dict[str, Any] = {}
    if transcodes:
        layer, read = match[1] if match else _layer(file), BARE if file.suffix == ".npz" else "mlp.hook_in"
        metadata |= {"hook_name": f"blocks.{layer}.{read}", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    else:
        # The hook point that version 2 gives for a transcoder may lack the other side; the folder's name has it.
        kind.check_names(file)
    if match and match[2] in HOOKS and not transcodes:
        metadata["hook_name"] = f"blocks.{match[1]}.{HOOKS[match[2]]}"
    if config.get("model_name"):
        name = str(config["model_name"]).replace("gemma-v3", "gemma-3")
        name = name if "/" in name else f"google/{name}"
        metadata["model_name"] = name.replace("gemma-3-270m-pt", "gemma-3-270m")
    return metadata


def _layer(file: Path) -> str:
    found = re.search(r"layer_(\d+)", Origin.of(file).inside)
    if found is None:
        raise UserError(f"{file} is a transcoder, and no folder above it is named layer_N; put it into one")
    return found[1]


register(Format("gemma_scope", ("params.npz", *split_files("params.safetensors"), "config.json"), sniff, read))

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
from saelab.interop.reading import checked, has_tensors, matrix_shape, read_json, read_tensors, split_files

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

    Transcoders of version 1 have the same tensors as SAEs: only the name of their repository tells them apart.
    """
    file = path
    if path.is_dir():
        file = next(path / name for name in FILES if has_tensors(path / name))
    config_file = file.parent / "config.json"
    config = read_json(config_file) if file.suffix == ".safetensors" and config_file.is_file() else {}
    raw = {str(name).replace("w_", "W_"): value for name, value in read_tensors(file).items()}
    kind.check_tensors(file, raw)
    metadata = _metadata(config, file)
    d_in, d_sae = matrix_shape(raw, "W_enc", file)
    shapes = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    tensors = checked(raw, shapes, file)
    if unused := sorted(raw.keys() - shapes.keys()):
        raise UserError(f"{file} holds {', '.join(unused)}, which no SAE of Gemma Scope has; get the file again")
    if config.get("hf_hook_point_in") and "hook_name" not in metadata:
        raise UserError(f"{file} reads {config['hf_hook_point_in']}, which is no hook point of an SAE known here")
    foreign = Foreign("gemma_scope", "jump_relu", subtracts_b_dec=False, metadata=metadata, **tensors)
    if "embedding" in Origin.of(file).inside.split("/"):
        # Trained on rows of the embedding matrix; Gemma multiplies them by sqrt(d_model) before the first block.
        foreign.input_scale = d_in**-0.5
        foreign.notes.append(
            "trained on embeddings before Gemma multiplies them by sqrt(d_model); the factor is folded in"
        )
    return foreign


def _metadata(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Model and hook point from version 2's configuration; UserError for a transcoder or crosscoder."""
    kind.check_type(file, config.get("type"), "type")
    hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    kind.check_hooks(file, hook_in, hook_out)
    if config.get("affine_connection"):
        kind.refuse(file, "transcoder", "its configuration has affine_connection=true")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{file}: architecture {config['architecture']!r} has no counterpart here; only jump_relu has")
    # The hook point that version 2 gives for a transcoder may lack the other side; the folder's name has it.
    kind.check_names(file)
    match = re.fullmatch(r".*layers\.(\d+)\.(.+)", str(hook_in))
    metadata: dict[str, Any] = {}
    if match and match[2] in HOOKS:
        metadata["hook_name"] = f"blocks.{match[1]}.{HOOKS[match[2]]}"
    if config.get("model_name"):
        name = str(config["model_name"]).replace("gemma-v3", "gemma-3")
        name = name if "/" in name else f"google/{name}"
        metadata["model_name"] = name.replace("gemma-3-270m-pt", "gemma-3-270m")
    return metadata


register(Format("gemma_scope", ("params.npz", *split_files("params.safetensors"), "config.json"), sniff, read))

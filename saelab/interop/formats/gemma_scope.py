"""Gemma Scope 1 and 2: ``params.npz`` or ``params.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path

from saelab.errors import UserError
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, matrix_shape, read_tensors

FILES = ("params.npz", "params.safetensors")


def sniff(path: Path) -> bool:
    """``params.npz`` or ``params.safetensors``, or the folder with it."""
    if path.is_dir():
        return any((path / name).is_file() for name in FILES)
    return path.name in FILES and path.is_file()


def read(path: Path) -> Foreign:
    """Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors``, lower-case names): JumpReLU, nothing subtracted."""
    file = path
    if path.is_dir():
        file = next(path / name for name in FILES if (path / name).is_file())
    raw = {str(name).replace("w_", "W_"): value for name, value in read_tensors(file).items()}
    if "affine_skip_connection" in raw:
        raise UserError(f"{file} is a transcoder; transcoders are out of saelab's scope")
    d_in, d_sae = matrix_shape(raw, "W_enc", file)
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
    return Foreign("gemma_scope", "jump_relu", subtracts_b_dec=False, metadata=metadata, notes=notes, **tensors)


register(Format("gemma_scope", FILES, sniff, read))

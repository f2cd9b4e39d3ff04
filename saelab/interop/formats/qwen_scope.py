"""Qwen Scope: one torch file ``layerN.sae.pt`` per layer."""

from __future__ import annotations

import re
from pathlib import Path

from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, matrix_shape, read_tensors


def sniff(path: Path) -> bool:
    """A file ``layerN.sae.pt``."""
    return path.name.endswith(".sae.pt") and path.is_file()


def read(path: Path) -> Foreign:
    """Qwen Scope ``layerN.sae.pt``: both matrices transposed; k stands in the name of the repository (``L0_50``)."""
    kind.check_names(path)
    raw = read_tensors(path)
    d_sae, d_in = matrix_shape(raw, "W_enc", path)
    shapes = {"W_enc": (d_sae, d_in), "W_dec": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)}
    tensors = checked(raw, shapes, path)
    k, layer = re.search(r"L0_(\d+)", str(path.absolute())), re.search(r"layer(\d+)", path.name)
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
        known_from={"hook_name": f"the file's name, {path.name}; Qwen Scope has SAEs of the residual stream alone"},
    )


register(Format("qwen_scope", ("*.sae.pt",), sniff, read))

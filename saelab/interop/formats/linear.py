"""SAEs of training tools in ``nn.Linear`` orientation: sparsify, OpenAI's; and what such formats share.

They differ in names, orientation and conventions only; each reader states them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.errors import UserError
from saelab.interop.foreign import Foreign
from saelab.interop.reading import checked, read_json, read_tensors


def d_of(tensors: dict[str, Any], name: str, origin: Path) -> tuple[int, int]:
    """The two sizes of the matrix ``name``."""
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise UserError(f"{origin} has no matrix {name!r}; it holds {', '.join(map(str, list(tensors)[:8]))}")
    return tensor.shape[0], tensor.shape[1]


def sniff_sparsify(path: Path) -> bool:
    """A folder with ``sae.safetensors``."""
    return (path / "sae.safetensors").is_file()


def read_sparsify(path: Path) -> Foreign:
    """EleutherAI sparsify: ``encoder.weight [d_sae, d_in]``, ``W_dec [d_sae, d_in]``, ReLU before top-k.

    The default configuration stores ``num_latents: 0``, so widths are read off the tensors.
    """
    config, origin = read_json(path / "cfg.json"), path / "sae.safetensors"
    if config.get("transcode") or config.get("skip_connection"):
        raise UserError(f"{path} is a transcoder; transcoders are out of saelab's scope")
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{path}: activation {config['activation']!r} has no counterpart here; only topk has")
    raw = read_tensors(origin)
    d_sae, d_in = d_of(raw, "W_dec", origin)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = checked(raw, shapes, origin)
    notes = []
    if not config.get("num_latents"):
        notes.append("num_latents is 0 in its configuration; the width is read off the weights")
    return Foreign(
        format="sparsify",
        architecture="abs_topk" if config.get("signed") else "topk",
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=config.get("k"),
        metadata={"hf_hook_name": path.name},
        notes=notes,
    )


def sniff_openai(path: Path) -> bool:
    """A torch file with a ``latent_bias``."""
    return path.is_file() and "latent_bias" in names(path)


def read_openai(path: Path) -> Foreign:
    """OpenAI's GPT-2 SAEs: ``pre_bias``, ``latent_bias``; TopK ones read layer-normed activations."""
    raw = read_tensors(path)
    d_sae, d_in = d_of(raw, "encoder.weight", path)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "latent_bias": (d_sae,),
        "pre_bias": (d_in,),
    }
    tensors = checked(raw, shapes, path)
    topk = "TopK" in str(raw.get("activation", ""))
    state = raw.get("activation_state_dict") or {}
    k = raw.get("activation.k", state.get("k"))
    return Foreign(
        format="openai",
        architecture="topk" if topk else "relu",
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["latent_bias"],
        W_dec=tensors["decoder.weight"].T,
        b_dec=tensors["pre_bias"],
        k=int(k) if k is not None else None,
        layer_norm=topk,
        notes=["reads layer-normed activations"] if topk else [],
    )


def linear(raw: dict[str, Any], origin: Path) -> dict[str, Any]:
    """``encoder.*`` and ``decoder.*`` of two ``nn.Linear`` as canonical tensors."""
    d_sae, d_in = d_of(raw, "encoder.weight", origin)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "decoder.bias": (d_in,),
    }
    tensors = checked(raw, shapes, origin)
    return {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder.bias"],
    }


def names(path: Path) -> set[str]:
    """Keys in a torch file; empty when it is not one (the caller is only asking)."""
    if path.suffix not in {".pt", ".pth", ".bin"}:
        return set()
    return {str(name) for name in read_tensors(path)}

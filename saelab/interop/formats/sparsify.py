"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saelab.errors import UserError
from saelab.files import write_json, write_tensors
from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register, subtracting_bias
from saelab.interop.reading import checked, flag, has_tensors, matrix_shape, read_json, read_tensors, split_files
from saelab.sae.inference import InferenceForm


def sniff(path: Path) -> bool:
    """A folder with ``sae.safetensors``."""
    return has_tensors(path / "sae.safetensors")


def read(path: Path) -> Foreign:
    """EleutherAI sparsify: ``encoder.weight [d_sae, d_in]``, ``W_dec [d_sae, d_in]``, ReLU before top-k.

    The default configuration stores ``num_latents: 0``, so widths are read off the tensors.
    """
    config, origin = read_json(path / "cfg.json"), path / "sae.safetensors"
    transcodes = flag(config, "transcode", False, path)
    skips = flag(config, "skip_connection", False, path)
    if skips and not transcodes:
        raise UserError(f"{path}: skip_connection=true without transcode=true has no counterpart here")
    if config.get("transcode") is None:  # from before sparsify trained transcoders, or by hand
        kind.check_names(path)
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{path}: activation {config['activation']!r} has no counterpart here; only topk has")
    raw = read_tensors(origin)
    d_sae, d_in = matrix_shape(raw, "W_dec", origin)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if skips:
        shapes["W_skip"] = (d_in, d_in)
    tensors = checked(raw, shapes, origin)
    notes = []
    if not config.get("num_latents"):
        notes.append("num_latents is 0 in its configuration; the width is read off the weights")
    return Foreign(
        format="sparsify",
        architecture="abs_topk" if flag(config, "signed", False, path) else "topk",
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=config.get("k"),
        transcodes=transcodes,
        W_skip=tensors.get("W_skip"),
        metadata=_metadata(path, transcodes),
        notes=notes,
    )


def _metadata(path: Path, transcodes: bool) -> dict[str, Any]:
    """Its folders are named after a module of the model, ``layers.9`` say; the run's configuration is above them.

    A transcoder reads what the module gets and writes what it gives.
    """
    folder = path.absolute()
    seeded = re.fullmatch(r"seed\d+", folder.name)
    module = folder.parent if seeded else folder
    found: dict[str, Any] = {"hf_hook_name": module.name} if "." in module.name or module.name == "embed_tokens" else {}
    if transcodes:
        layer = re.search(r"(^|\.)(layers|h|blocks)\.(\d+)\.mlp$", module.name)
        found = {"hf_hook_name_out": module.name} if found else {}
        if layer:
            found |= {"hook_name": f"blocks.{layer[3]}.mlp.hook_in", "hook_name_out": f"blocks.{layer[3]}.hook_mlp_out"}
    run = module.parent / "config.json"
    if run.is_file():
        settings = read_json(run)
        found |= {"model_name": settings.get("model"), "context_size": settings.get("ctx_len")}
        found["dataset_path"] = settings.get("dataset")
    return found


def write(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    """Write a TopK form; sparsify has no place for ``metadata``."""
    if form.architecture != "topk":
        raise UserError(f"sparsify knows TopK only; this SAE is {form.architecture} at inference")
    t = form.tensors
    d_sae, d_in = t["W_dec"].shape
    if form.d_out is not None and len(t["W_enc"]) != d_in:
        raise UserError(f"sparsify's transcoders have one width; this one reads {len(t['W_enc'])} and writes {d_in}")
    bias = subtracting_bias(form) if form.d_out is None else t["b_enc"]
    tensors = {"encoder.weight": t["W_enc"].T, "encoder.bias": bias, "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if "W_skip" in t:
        tensors["W_skip"] = t["W_skip"]
    write_tensors(folder / "sae.safetensors", tensors)
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": d_sae}
    config |= {"k": form.config["k"], "multi_topk": False, "d_in": d_in}
    config |= {"skip_connection": "W_skip" in t, "transcode": form.d_out is not None}
    write_json(folder / "cfg.json", config)


register(Format("sparsify", ("cfg.json", *split_files("sae.safetensors")), sniff, read, write, holds_targets=True))

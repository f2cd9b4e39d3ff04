"""Llamascopium (OpenMOSS's training tool): ``config.json`` and ``sae_weights.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saelab.errors import UserError
from saelab.interop import kind, normalisation
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import (
    checked,
    flag,
    has_tensors,
    matrix_shape,
    read_json,
    read_linear,
    read_tensors,
    split_files,
)

NORM = "dataset_average_activation_norm."  # followed by the hook point: a scalar in the weights
THRESHOLD = "log_jumprelu_threshold"  # possibly behind the name of a module
ACTIVATIONS = {"relu": "relu", "jumprelu": "jump_relu", "topk": "topk"}


def sniff(path: Path) -> bool:
    """``config.json``, and no ``cfg.json``, beside a file named like SAELens' weights."""
    is_saelens = (path / "cfg.json").is_file()
    return not is_saelens and (path / "config.json").is_file() and has_tensors(path / "sae_weights.safetensors")


def read(path: Path, input_scale: float | None = None) -> Foreign:
    """Llamascopium: ``W_E b_E W_D b_D`` or ``encoder.*`` in a file named like SAELens' own.

    ``input_scale`` is what its activations were multiplied by, where the files do not say it.
    """
    config, file = read_json(path / "config.json"), path / "sae_weights.safetensors"
    ends = config.get("hook_point_in"), config.get("hook_point_out")
    transcodes = bool(ends[0] and ends[1] and ends[0] != ends[1])
    if config.get("sae_type", "sae") != "sae":
        kind.refuse(path, str(config["sae_type"]), f"its configuration has sae_type={config['sae_type']!r}")
    if not config.get("hook_point_out"):
        kind.check_names(path)
    raw = read_tensors(file)
    tensors = _tensors(raw, config, file, transcodes)
    act = config.get("act_fn", "relu")
    if act not in ACTIVATIONS:
        raise UserError(f"{path}: activation {act!r} has no counterpart here; {', '.join(ACTIVATIONS)} have")
    if config.get("use_glu_encoder"):
        raise UserError(f"{path} has a gated linear encoder (use_glu_encoder), which has no counterpart here")
    foreign = Foreign(
        format="llamascopium",
        architecture=ACTIVATIONS[act],
        k=config.get("top_k"),
        subtracts_b_dec=flag(config, "apply_decoder_bias_to_pre_encoder", False, path),
        transcodes=transcodes,
        metadata={"hook_name": ends[0], **({"hook_name_out": ends[1]} if transcodes else {})},
        **tensors,
    )
    _select(foreign, config, raw, file)
    _normalise(foreign, config, raw, path, input_scale)
    return foreign


def _tensors(raw: dict[str, Any], config: dict[str, Any], file: Path, transcodes: bool) -> dict[str, Any]:
    if "W_E" not in raw:
        return read_linear(raw, file, transcodes)
    renamed = {"W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc", "b_D": "b_dec"}
    raw = {renamed.get(name, name): value for name, value in raw.items()}
    d_in, d_sae = matrix_shape(raw, "W_enc", file)
    d_out = matrix_shape(raw, "W_dec", file)[1] if transcodes else d_in
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,)}
    if flag(config, "use_decoder_bias", True, file):
        return checked(raw, {**shapes, "b_dec": (d_out,)}, file)
    return {**checked(raw, shapes, file), "b_dec": torch.zeros(d_out)}


def _select(foreign: Foreign, config: dict[str, Any], raw: dict[str, Any], file: Path) -> None:
    """The threshold, and selection by ``u * |d|``; values are ``u``, so dictionary and biases stay as they are."""
    by_norm = flag(config, "sparsity_include_decoder_norm", True, file)
    norms = foreign.W_dec.norm(dim=1) if by_norm else torch.ones(foreign.d_sae)
    if foreign.architecture == "jump_relu":
        name = next((str(name) for name in raw if str(name).endswith(THRESHOLD)), THRESHOLD)
        levels = checked(raw, {name: (foreign.d_sae,)}, file)[name].exp()
        foreign.threshold = levels / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    elif foreign.architecture == "topk" and (norms - 1).abs().max() > 1e-3:
        # Codes are those of the dictionary with unit rows: u * |d| for u.
        foreign.rescale_by_decoder_norm = True
        foreign.notes.append("latents are selected by activation times decoder norm; the norms are folded in")


def _normalise(
    foreign: Foreign, config: dict[str, Any], raw: dict[str, Any], path: Path, input_scale: float | None
) -> None:
    how = config.get("norm_activation", "dataset-wise" if input_scale is None else "inference")
    norm = raw.get(f"{NORM}{config.get('hook_point_in')}")
    if input_scale is not None:
        foreign.input_scale = input_scale
    elif how == "dataset-wise":
        if norm is None or not float(norm) > 0:
            normalisation.no_scale(path, "norm_activation=dataset-wise")
        foreign.input_scale = foreign.d_in**0.5 / float(norm)
        if foreign.transcodes:
            norm_out = raw.get(f"{NORM}{config.get('hook_point_out')}")
            if norm_out is None or not float(norm_out) > 0:
                raise UserError(f"{path} does not hold the norm of its target, {NORM}{config.get('hook_point_out')}")
            foreign.output_scale = foreign.W_dec.shape[1] ** 0.5 / float(norm_out)
    elif how == "token-wise":
        foreign.normalize = "constant_norm_rescale"
        foreign.notes.append(normalisation.per_token("constant_norm_rescale"))
    elif how != "inference":
        raise UserError(f"{path}: norm_activation={how!r} depends on the batch, which has no counterpart here")
    if foreign.input_scale != 1.0:
        foreign.notes.append(f"trained on activations times {foreign.input_scale:.4g}; the factor is folded in")


FILES = ("config.json", *split_files("sae_weights.safetensors"))
register(Format("llamascopium", FILES, sniff, read, options=("input_scale",)))

"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch

from saelab.errors import UserError
from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import flag, read_json, read_linear, read_tensors, split_files


def sniff(path: Path) -> bool:
    """A folder with ``hyperparams.json``."""
    return (path / "hyperparams.json").is_file()


def read(path: Path) -> Foreign:
    """Llama Scope: ``checkpoints/final.safetensors``, one threshold for all latents, inputs scaled to norm sqrt(d)."""
    config = read_json(path / "hyperparams.json")
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    transcodes = bool(hook_in and hook_out and hook_in != hook_out)
    if not hook_out:
        kind.check_names(path)
    for name, wanted in {"act_fn": "jumprelu", "norm_activation": "dataset-wise"}.items():
        if config.get(name, wanted) != wanted:
            raise UserError(f"{path}: {name}={config[name]!r} has no counterpart in Llama Scope's files; {wanted} has")
    file = path / "checkpoints" / "final.safetensors"
    tensors = read_linear(read_tensors(file), file, transcodes)
    d_in, d_sae = tensors["W_enc"].shape
    try:
        norm = float(config["dataset_average_activation_norm"]["in"])
        norm_out = float(config["dataset_average_activation_norm"]["out"]) if transcodes else norm
        threshold = float(config["jump_relu_threshold"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'hyperparams.json'} lacks the threshold or the average norm ({error}); get it again"
        ) from error
    scale = d_in**0.5 / norm
    scale_out = tensors["W_dec"].shape[1] ** 0.5 / norm_out
    # Published weights act on scaled inputs, the threshold on those of its tool at inference, where both scales are
    # folded in: u / scale, times the norm of d * scale / scale_out where the norm counts, as it does by default.
    if flag(config, "sparsity_include_decoder_norm", True, path):
        levels = threshold * scale_out / tensors["W_dec"].norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        levels = torch.full((d_sae,), threshold * scale)
    return Foreign(
        format="llama_scope",
        architecture="jump_relu",
        threshold=levels,
        subtracts_b_dec=flag(config, "apply_decoder_bias_to_pre_encoder", False, path),
        input_scale=scale,
        transcodes=transcodes,
        output_scale=scale_out,
        metadata={"hook_name": hook_in, **({"hook_name_out": hook_out} if transcodes else {})},
        notes=[f"trained on activations times {scale:.4g}; the factor is folded in"],
        **tensors,
    )


register(Format("llama_scope", ("hyperparams.json", *split_files("checkpoints/final.safetensors")), sniff, read))

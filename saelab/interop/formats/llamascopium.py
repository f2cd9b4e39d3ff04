"""Llamascopium (OpenMOSS's training tool): ``config.json`` and ``sae_weights.safetensors``."""

from __future__ import annotations

from pathlib import Path

from saelab.errors import UserError
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, matrix_shape, read_json, read_linear, read_tensors


def sniff(path: Path) -> bool:
    """``config.json``, and no ``cfg.json``, beside a file named like SAELens' weights."""
    is_saelens = (path / "cfg.json").is_file()
    return not is_saelens and (path / "config.json").is_file() and (path / "sae_weights.safetensors").is_file()


def read(path: Path) -> Foreign:
    """Llamascopium: ``W_E b_E W_D b_D`` or ``encoder.*`` in a file named like SAELens' own."""
    config, file = read_json(path / "config.json"), path / "sae_weights.safetensors"
    raw = read_tensors(file)
    renamed = {"W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc", "b_D": "b_dec"}
    if "W_E" in raw:
        raw = {renamed.get(name, name): value for name, value in raw.items()}
        d_in, d_sae = matrix_shape(raw, "W_enc", file)
        shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        tensors = checked(raw, shapes, file)
    else:
        tensors = read_linear(raw, file)
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


register(Format("llamascopium", ("config.json", "sae_weights.safetensors"), sniff, read))

"""``NAME.pt`` beside ``NAME_cfg.json``: the layout of Neel Nanda's 1L-Sparse-Autoencoder, and of Kissane et al."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab.errors import UserError
from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, matrix_shape, read_json, read_tensors

SETTINGS = "_cfg.json"


def _settings(path: Path) -> Path:
    return path.with_name(path.stem + SETTINGS)


def sniff(path: Path) -> bool:
    """A torch file with a file of settings of the same name."""
    return path.suffix == ".pt" and path.is_file() and _settings(path).is_file()


def read(path: Path) -> Foreign:
    """ReLU, ``b_dec`` subtracted; ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]`` with rows of norm 1."""
    config, raw = read_json(_settings(path)), read_tensors(path)
    kind.check_names(path)
    d_in, d_sae = matrix_shape(raw, "W_enc", path)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    kind.check_tensors(path, raw)
    for name in ("activation", "activation_fn", "act_fn"):
        if config.get(name, "relu") != "relu":
            raise UserError(f"{path}: activation {config[name]!r} has no counterpart in this layout; relu has")
    if config.get("act_size", d_in) != d_in:
        raise UserError(f"{path} reads width {d_in}, its settings say act_size={config['act_size']}; get it again")
    names = {"model_name": ("model_name", str), "context_size": ("seq_len", int), "hook_name": ("act_name", str)}
    metadata: dict[str, Any] = {
        name: config[key] for name, (key, kind_of) in names.items() if isinstance(config.get(key), kind_of)
    }
    notes = []
    if str(metadata.get("hook_name")).endswith("hook_z"):
        notes.append("reads attention heads' outputs laid side by side (hook_z): pass [n, heads * d_head]")
        notes.append(
            "TransformerLens moves the biases of values behind hook_z by default (fold_value_biases), and these files "
            "do not say whether it did: in a model with such biases (GPT-2) activations may differ by them"
        )
    return Foreign("nanda", "relu", metadata=metadata, notes=notes, **checked(raw, shapes, path))


register(Format("nanda", ("*.pt", f"*{SETTINGS}"), sniff, read))

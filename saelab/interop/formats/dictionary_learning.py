"""dictionary_learning folders: ``ae.pt`` + ``config.json``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.files import write_json
from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register, subtracting_bias
from saelab.interop.origin import Origin
from saelab.interop.reading import above_zero, checked, matrix_shape, read_json, read_tensors, tensor_names
from saelab.lm.hook_names import layer_of
from saelab.sae.inference import InferenceForm

BACKUP = {"step", "ae", "optimizer"}  # keys of a mid-run backup, which has the name of the final file
# Words of submodule_name, and of the folder's name where that is missing -> hook point of the block.
PLACES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_out": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


def sniff(path: Path) -> bool:
    """A folder with ``ae.pt``, or a torch file ``ae*.pt`` with one of its dictionaries (``ae_1000.pt``, say)."""
    if (path / "ae.pt").is_file() or (path.name == "ae.pt" and path.is_file()):
        return True
    if not (path.is_file() and path.name.startswith("ae") and path.suffix == ".pt"):
        return False
    keys = tensor_names(path)
    return bool(keys & {"encoder.weight", "W_enc", "ae"}) and "latent_bias" not in keys and ".sae" not in path.suffixes


def read(path: Path) -> Foreign:
    """Any of its classes, recognised by ``dict_class`` in the configuration or, without one, by the tensors."""
    file = path / "ae.pt" if path.is_dir() else path
    config = read_json(file.parent / "config.json") if (file.parent / "config.json").is_file() else {}
    trainer, buffer = config.get("trainer") or {}, config.get("buffer") or {}
    kind.check_type(file, trainer.get("dict_class"), "dict_class")
    if buffer.get("io") == "in_and_out":
        kind.refuse(file, "transcoder", "its buffer held inputs and outputs of a module (io=in_and_out)")
    if not trainer.get("submodule_name"):
        kind.check_names(path)
    raw, notes = read_tensors(file), []
    scale = 1.0
    if set(raw) >= BACKUP:
        scale = float(raw.get("norm_factor") or 1.0)
        raw = raw["ae"]
        notes.append("a mid-run backup, not the final weights")
        if scale != 1.0:
            notes.append(f"its data were divided by {scale:.4g}; the factor is folded in")
    name = trainer.get("dict_class") or _class_of(raw, file)
    if name not in READERS:
        raise UserError(f"{file}: dictionary class {name!r} is not one of {', '.join(READERS)}")
    foreign = READERS[name](raw, file)
    foreign.notes = notes + foreign.notes
    foreign.input_scale = 1 / scale
    foreign.metadata = {"model_name": trainer.get("lm_name"), "context_size": buffer.get("ctx_len")}
    foreign.metadata["hook_name"] = _hook(trainer, buffer, path, foreign)
    return foreign


def _hook(trainer: dict[str, Any], buffer: dict[str, Any], path: Path, foreign: Foreign) -> str | None:
    """The hook point: the block is recorded, the place in it stands in the name of the submodule or of the folder."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    if layer is None:
        return None
    inside = Origin.of(path).inside
    place = next((hook for word, hook in PLACES.items() if word in (name or inside)), None)
    if place is None and not name:
        foreign.notes.append(
            f"its place in block {layer} is not recorded; the residual stream behind the block is assumed"
        )
        foreign.known_from["hook_name"] = "its configuration (the block); the residual stream is assumed"
        return f"blocks.{layer}.hook_resid_post"
    if place is None or (buffer.get("io") == "in" and place.endswith("_out")):
        foreign.notes.append(f"reads {buffer.get('io', 'out')} of {name} in block {layer}: give its hook point")
        return None
    return f"blocks.{layer}.{place}"


def _class_of(raw: dict[str, Any], file: Path) -> str:
    if "group_sizes" in raw:
        return "MatryoshkaBatchTopKSAE"
    if "r_mag" in raw:
        return "GatedAutoEncoder"
    if "W_enc" in raw:
        return "JumpReluAutoEncoder"
    if "k" in raw:
        raise UserError(f"{file} is a TopK or a BatchTopK SAE; its config.json, which says which, is missing")
    return "AutoEncoderNew" if "decoder.bias" in raw else "AutoEncoder"


def _nn_linear(raw: dict[str, Any], file: Path, bias: str, encoder_bias: str | None) -> dict[str, Any]:
    d_sae, d_in = matrix_shape(raw, "encoder.weight", file)
    shapes = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae), bias: (d_in,)}
    if encoder_bias:
        shapes[encoder_bias] = (d_sae,)
    t = checked(raw, shapes, file)
    b_enc = t[encoder_bias] if encoder_bias else torch.zeros(d_sae)
    return {"W_enc": t["encoder.weight"].T, "W_dec": t["decoder.weight"].T, "b_dec": t[bias], "b_enc": b_enc}


def _standard(raw: dict[str, Any], file: Path) -> Foreign:
    tensors = _nn_linear(raw, file, "bias", "encoder.bias")
    return Foreign("dictionary_learning", "relu", **tensors)


def _standard_new(raw: dict[str, Any], file: Path) -> Foreign:
    tensors = _nn_linear(raw, file, "decoder.bias", "encoder.bias")
    return Foreign("dictionary_learning", "relu", subtracts_b_dec=False, **tensors)


def _gated(raw: dict[str, Any], file: Path) -> Foreign:
    tensors = _nn_linear(raw, file, "decoder_bias", "gate_bias")
    more = checked(raw, {name: tuple(tensors["b_enc"].shape) for name in ("r_mag", "mag_bias")}, file)
    return Foreign("dictionary_learning", "gated", r_mag=more["r_mag"], b_mag=more["mag_bias"], **tensors)


def _topk(raw: dict[str, Any], file: Path) -> Foreign:
    tensors = _nn_linear(raw, file, "b_dec", "encoder.bias")
    return Foreign("dictionary_learning", "topk", k=int(raw["k"]), **tensors)


def _batch_topk(raw: dict[str, Any], file: Path) -> Foreign:
    tensors = _nn_linear(raw, file, "b_dec", "encoder.bias")
    return Foreign("dictionary_learning", "jump_relu", threshold=_threshold(raw, file, tensors), **tensors)


def _own_names(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    d_in, d_sae = matrix_shape(raw, "W_enc", file)
    return checked(raw, {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}, file)


def _matryoshka(raw: dict[str, Any], file: Path) -> Foreign:
    tensors = _own_names(raw, file)
    return Foreign("dictionary_learning", "jump_relu", threshold=_threshold(raw, file, tensors), **tensors)


def _jump_relu(raw: dict[str, Any], file: Path) -> Foreign:
    tensors = _own_names(raw, file)
    threshold = checked(raw, {"threshold": tuple(tensors["b_enc"].shape)}, file)["threshold"]
    threshold = above_zero(threshold)  # its trainer may push it below
    return Foreign("dictionary_learning", "jump_relu", threshold=threshold, subtracts_b_dec=False, **tensors)


def _threshold(raw: dict[str, Any], file: Path, tensors: dict[str, Tensor]) -> Tensor:
    value = float(raw.get("threshold", -1.0))
    if value < 0:
        raise UserError(f"{file}: its threshold was never set (training stopped too early), so it cannot be used")
    return torch.full_like(tensors["b_enc"], value)


READERS = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu,
}


def write(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    """Write a form that one of its classes computes."""
    t = form.tensors
    encoder = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T} if "W_enc" in t else {}
    if form.architecture == "topk":
        name = "AutoEncoderTopK"
        state = encoder | {"encoder.bias": subtracting_bias(form), "b_dec": t["b_dec"]}
        state |= {"k": torch.tensor(form.config["k"], dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    elif form.architecture == "jumprelu":
        name = "JumpReluAutoEncoder"
        # This class subtracts no b_dec; the encoder's bias takes it.
        b_enc = t["b_enc"] if not form.config["apply_b_dec_to_input"] else t["b_enc"] - t["b_dec"] @ t["W_enc"]
        state = {**{key: t[key] for key in ("W_enc", "W_dec", "b_dec", "threshold")}, "b_enc": b_enc}
    elif form.architecture == "standard":
        name, state = "AutoEncoder", encoder | {"encoder.bias": subtracting_bias(form), "bias": t["b_dec"]}
    elif form.architecture == "gated":
        name = "GatedAutoEncoder"
        state = encoder | {"decoder_bias": t["b_dec"], "gate_bias": t["b_gate"], "r_mag": t["r_mag"]}
        state["mag_bias"] = t["b_mag"]
    else:
        raise UserError(f"dictionary_learning has no class for {form.architecture}; write it for saelens")
    packed = io.BytesIO()  # torch reports a full disk as an internal error; Path says what it is
    torch.save({key: value.detach().contiguous() for key, value in state.items()}, packed)
    (folder / "ae.pt").write_bytes(packed.getbuffer())
    d_sae, d_in = t["W_dec"].shape
    trainer = {"dict_class": name, "activation_dim": d_in, "dict_size": d_sae, "lm_name": metadata.get("model_name")}
    trainer |= {"k": form.config.get("k"), "layer": layer_of(metadata.get("hook_name") or "")}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": metadata.get("context_size")}})


register(Format("dictionary_learning", ("ae*.pt", "config.json"), sniff, read, write))

"""SAELens folders: ``cfg.json`` + ``sae_weights.safetensors``, in the present layout and the flat one before 6.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saelab._version import __version__
from saelab.errors import UserError, near_matches
from saelab.files import write_json, write_tensors
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, read_json, read_tensors
from saelab.sae.inference import InferenceForm
from saelab.sae.weights import SAELENS_VERSION

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "abs_topk",
    "jumprelu": "jump_relu",
    "gated": "gated",
    "matching_pursuit": "matching_pursuit",
    # Training checkpoints that have not been exported for inference yet.
    "batchtopk": "jump_relu",
    "matryoshka_batchtopk": "jump_relu",
}
NOT_SAES = {"transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "temporal"}
METADATA = (
    "model_name",
    "hook_name",
    "hf_hook_name",
    "context_size",
    "prepend_bos",
    "dataset_path",
    "neuronpedia_id",
    "sae_lens_version",
)


def sniff(path: Path) -> bool:
    """A folder with SAELens' two files."""
    return (path / "cfg.json").is_file() and (path / "sae_weights.safetensors").is_file()


def read(path: Path) -> Foreign:
    """Read a SAELens folder. Raises UserError for transcoders and for what does not hold what ``cfg.json`` says."""
    config = read_json(path / "cfg.json")
    if not isinstance(config.get("metadata", {}), dict):
        raise UserError(f"{path / 'cfg.json'}: metadata is not an object")
    notes = _notes(config)
    if _is_flat(config):
        config = _from_flat(config)
        notes.append("configuration in the flat layout from before SAELens 6")
    architecture = str(config.get("architecture", "standard"))
    if architecture in NOT_SAES:
        raise UserError(f"{path} is a {architecture}: transcoders and temporal SAEs are out of saelab's scope")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: unknown SAELens architecture {architecture!r}; {near_matches(architecture, ARCHITECTURES)}"
        )
    d_in, d_sae = _width(config, "d_in", path), _width(config, "d_sae", path)
    raw = read_tensors(path / "sae_weights.safetensors")
    shapes = {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if architecture != "matching_pursuit":
        shapes |= {"W_enc": (d_in, d_sae), "b_gate" if architecture == "gated" else "b_enc": (d_sae,)}
    if architecture == "gated":
        shapes |= {"r_mag": (d_sae,), "b_mag": (d_sae,)}
    if architecture == "jumprelu":
        shapes |= {"threshold": (d_sae,)}
    tensors = checked(raw, shapes, path / "sae_weights.safetensors")
    foreign = Foreign(
        format="saelens",
        architecture=ARCHITECTURES[architecture],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_enc=tensors.get("W_enc"),
        b_enc=tensors.get("b_gate" if architecture == "gated" else "b_enc"),
        k=config.get("k"),
        threshold=tensors.get("threshold"),
        r_mag=tensors.get("r_mag"),
        b_mag=tensors.get("b_mag"),
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        layer_norm=config.get("normalize_activations") == "layer_norm",
        rescale_by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
        metadata=dict(config.get("metadata", {})),
        notes=notes,
    )
    if architecture in {"batchtopk", "matryoshka_batchtopk"}:
        foreign.threshold = _training_threshold(raw, d_sae, path)
        notes.append(f"a {architecture} training checkpoint: its running threshold is used, as at inference")
    if architecture == "matching_pursuit":
        foreign.pursuit = _pursuit(config)
        foreign.subtracts_b_dec = foreign.pursuit["use_b_dec"]
    return foreign


def _notes(config: dict[str, Any]) -> list[str]:
    notes = []
    if config.get("normalize_activations") not in {None, "none", False, "layer_norm"}:
        notes.append(
            f"trained with normalize_activations={config['normalize_activations']!r}, whose scale is not in the "
            "folder: right only if it has been folded into the weights, as SAELens' final output is"
        )
    if config.get("reshape_activations") == "hook_z":
        notes.append("reads attention heads' outputs laid side by side (hook_z): pass [n, heads * d_head]")
    if config.get("finetuning_scaling_factor"):
        notes.append("has a fine-tuning scaling factor, which is not applied")
    return notes


def _is_flat(config: dict[str, Any]) -> bool:
    version = config.get("sae_lens_version") or config.get("metadata", {}).get("sae_lens_version")
    return not version or int(str(version).split(".")[0]) < 6


def _from_flat(config: dict[str, Any]) -> dict[str, Any]:
    """The flat layout's names, translated."""
    new = dict(config)
    for old, name in {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}.items():
        if old in new:
            new.setdefault(name, new[old])
    kwargs = new.get("activation_fn_kwargs") or {}
    if new.get("activation_fn") == "topk" and "k" in kwargs:
        new |= {"architecture": "topk", "k": kwargs["k"]}
    if "metadata" not in new:
        new["metadata"] = {name: new[name] for name in METADATA if name in new}
    return new


def _width(config: dict[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or not 0 < value < 2**31:
        raise UserError(f"{path / 'cfg.json'}: {name}={value!r} is not a width")
    return value


def _training_threshold(raw: dict[str, Any], d_sae: int, path: Path) -> torch.Tensor:
    value = raw.get("topk_threshold")
    if value is None or value.numel() != 1:
        raise UserError(f"{path} has no topk_threshold; it cannot be used outside training")
    return torch.full((d_sae,), float(value))


def _pursuit(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_steps": config.get("max_iterations") or config["d_in"],
        "residual_stop": float(config.get("residual_threshold", 0.01)),
        "stop_on_repeat": bool(config.get("stop_on_duplicate_support", True)),
        "use_b_dec": bool(config.get("apply_b_dec_to_input", True)),
    }


def write(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    """Write any form that SAELens knows."""
    write_tensors(folder / "sae_weights.safetensors", form.tensors)
    d_sae, d_in = form.tensors["W_dec"].shape
    config = {
        "architecture": form.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **form.config,
        "metadata": {**metadata, "sae_lens_version": SAELENS_VERSION, "saelab_version": __version__},
    }
    config["metadata"].pop("saelab", None)  # it describes the original, not this form
    write_json(folder / "cfg.json", config)


register(Format("saelens", ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors"), sniff, read, write))

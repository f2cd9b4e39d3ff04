"""SAELens folders: ``cfg.json`` + ``sae_weights.safetensors``, in the present layout and the flat one before 6.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saelab._version import __version__
from saelab.errors import UserError, near_matches
from saelab.files import write_json, write_tensors
from saelab.interop import collections, kind, normalisation
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import above_zero, checked, flag, has_tensors, read_json, read_tensors, split_files
from saelab.sae.inference import TRANSCODERS, InferenceForm
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
TARGETS = {name.format(skip): rule for rule, name in TRANSCODERS.items() for skip in ("", "skip_")}
METADATA = (
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_name_out", "hf_hook_name"),
    *("hook_head_index", "context_size", "prepend_bos", "exclude_special_tokens", "seqpos_slice", "dataset_path"),
    *("neuronpedia_id", "sae_lens_version"),
)
# Options of TransformerLens that change activations, beside center_writing_weights, which is applied.
PROCESSING = ("fold_value_biases", "refactor_factored_attn_matrices")
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"  # in a checkpoint of the training
USED_ELSEWHERE = ("threshold", "log_threshold", "b_enc", "r_mag", "b_mag", "b_gate")  # by other architectures
FACTORS = ("finetuning_scaling_factor", "scaling_factor")  # names of the factor per latent that fine-tuning adds


def sniff(path: Path) -> bool:
    """A folder with SAELens' two files."""
    return (path / "cfg.json").is_file() and has_tensors(path / "sae_weights.safetensors")


def read(path: Path, input_scale: float | None = None) -> Foreign:
    """Read a SAELens folder; ``input_scale`` is what its activations were multiplied by, where no file says it.

    Raises UserError for what does not hold what ``cfg.json`` says.
    """
    config = read_json(path / "cfg.json")
    if not isinstance(config.get("metadata", {}), dict):
        raise UserError(f"{path / 'cfg.json'}: metadata is not an object")
    notes = []
    if _is_flat(config):
        config = _from_flat(config)
        notes.append("configuration in the flat layout from before SAELens 6")
    architecture = _architecture(config, path)
    metadata = _metadata(config, path)
    d_in, d_sae = _width(config, "d_in", path), _width(config, "d_sae", path)
    raw = read_tensors(path / "sae_weights.safetensors")
    transcodes, name = architecture in TARGETS, architecture
    d_out = _width(config, "d_out", path) if transcodes and "d_out" in config else d_in
    architecture = TARGETS.get(name, name)
    shapes = _shapes(architecture, d_in, d_sae, d_out, skip=transcodes and "skip_" in name)
    tensors = checked(raw, shapes, path / "sae_weights.safetensors")
    foreign = Foreign(
        format="saelens",
        architecture=ARCHITECTURES[architecture],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_enc=tensors.get("W_enc"),
        b_enc=tensors.get("b_gate" if architecture == "gated" else "b_enc"),
        k=config.get("k"),
        threshold=above_zero(tensors["threshold"]) if "threshold" in tensors else None,
        r_mag=tensors.get("r_mag"),
        b_mag=tensors.get("b_mag"),
        subtracts_b_dec=not transcodes and flag(config, "apply_b_dec_to_input", True, path),
        transcodes=transcodes,
        W_skip=tensors.get("W_skip"),
        rescale_by_decoder_norm=flag(config, "rescale_acts_by_decoder_norm", False, path),
        metadata=metadata,
        notes=notes + _notes(config, metadata),
    )
    if unused := sorted(raw.keys() - shapes.keys() - {"topk_threshold", *USED_ELSEWHERE, *FACTORS}):
        foreign.notes.append(f"its weights hold {', '.join(unused)}, of which nothing is known here; left out")
    if architecture in {"batchtopk", "matryoshka_batchtopk"}:
        foreign.threshold = _training_threshold(raw, d_sae, path)
        foreign.notes.append(f"a {architecture} training checkpoint: its running threshold is used, as at inference")
    if architecture == "matching_pursuit":
        foreign.pursuit = _pursuit(config, path)
        foreign.subtracts_b_dec = foreign.pursuit["use_b_dec"]
    _scale_latents(foreign, config, raw, path)
    _normalise(foreign, config, path, input_scale)
    return foreign


def _shapes(architecture: str, d_in: int, d_sae: int, d_out: int, skip: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that an architecture consists of."""
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if skip:
        shapes["W_skip"] = (d_out, d_in)
    if architecture != "matching_pursuit":
        shapes |= {"W_enc": (d_in, d_sae), "b_gate" if architecture == "gated" else "b_enc": (d_sae,)}
    if architecture == "gated":
        shapes |= {"r_mag": (d_sae,), "b_mag": (d_sae,)}
    return shapes | ({"threshold": (d_sae,)} if architecture == "jumprelu" else {})


def _architecture(config: dict[str, Any], path: Path) -> str:
    """SAELens' name of the architecture; UserError for what is no SAE, or has an activation function of its own."""
    if "architecture" not in config and config.get("k") is not None:
        raise UserError(f'{path / "cfg.json"} has k and no architecture; add it, such as "architecture": "topk"')
    architecture, metadata = str(config.get("architecture", "standard")), config.get("metadata", {})
    if architecture == "temporal":
        kind.refuse(path, "temporal SAE", f"its architecture is {architecture}")
    if architecture in TARGETS:
        if not metadata.get("hook_name_out"):
            raise UserError(f"{path} is a transcoder, and its cfg.json has no hook_name_out, what it writes; add it")
        return architecture
    if config.get("is_transcoder"):
        kind.refuse(path, "transcoder", "its configuration has is_transcoder=true")
    kind.check_hooks(path, metadata.get("hook_name"), metadata.get("hook_name_out") or config.get("out_hook_point"))
    if config.get("d_out") not in {None, config.get("d_in")}:
        kind.refuse(path, "transcoder", f"it reads width {config.get('d_in')} and writes width {config['d_out']}")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: unknown SAELens architecture {architecture!r}; {near_matches(architecture, ARCHITECTURES)}"
        )
    if config.get("activation_fn", "relu") not in {"relu", "topk", None}:
        raise UserError(f"{path}: activation {config['activation_fn']!r} has no counterpart here; relu and topk have")
    return architecture


def _metadata(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What is known of the origin, without nulls; UserError for a name that is no text."""
    known = {name: value for name, value in config.get("metadata", {}).items() if value is not None}
    for name in ("model_name", "hook_name", "hook_name_out", "hf_hook_name"):
        if not isinstance(known.get(name, ""), str):
            raise UserError(f"{path / 'cfg.json'}: {name}={known[name]!r} is no text; correct it")
    if "prepend_bos" in known:
        flag(known, "prepend_bos", True, path / "cfg.json")
    return known


def _notes(config: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    notes = []
    if config.get("reshape_activations") == "hook_z" or str(metadata.get("hook_name")).endswith("hook_z"):
        notes.append("reads attention heads' outputs laid side by side (hook_z): pass [n, heads * d_head]")
    if metadata.get("hook_head_index") is not None:
        notes.append(f"reads a single attention head, number {metadata['hook_head_index']}")
    if metadata.get("exclude_special_tokens"):
        notes.append("trained without special tokens, so it says nothing about them")
    if (positions := metadata.get("seqpos_slice")) and any(bound is not None for bound in positions):
        notes.append(f"trained on positions {positions} of each context only")
    options = metadata.get("model_from_pretrained_kwargs")
    changed = {k: v for k, v in options.items() if v and k in PROCESSING} if isinstance(options, dict) else {}
    if changed:
        notes.append(f"trained on a model that TransformerLens changed ({', '.join(changed)}); activations may differ")
    return notes


def _scale_latents(foreign: Foreign, config: dict[str, Any], raw: dict[str, Any], path: Path) -> None:
    """Fold the factor per latent that fine-tuning learned: the decoder multiplies its latents by it."""
    name = next((name for name in FACTORS if name in raw), None)
    if name is None:
        if config.get("finetuning_scaling_factor"):
            raise UserError(f"{path} says it has a fine-tuning scaling factor, which its weights lack; get it again")
        return
    factor = checked(raw, {name: (foreign.d_sae,)}, path / "sae_weights.safetensors")[name]
    if torch.allclose(factor, torch.ones_like(factor)):
        return
    if not config.get("finetuning_scaling_factor"):
        raise UserError(
            f"{path}: its weights hold a fine-tuning scaling factor and its cfg.json says it is not used; "
            "set finetuning_scaling_factor there to true, or delete the tensor"
        )
    foreign.W_dec = foreign.W_dec * factor[:, None]
    foreign.notes.append("its fine-tuning scaling factor is folded into the decoder")


def _normalise(foreign: Foreign, config: dict[str, Any], path: Path, input_scale: float | None) -> None:
    """Apply the normalisation of the activations that the SAE was trained with, or refuse the SAE."""
    # What was converted is what the converter wrote, whatever its folder is called.
    member = None if "converted" in foreign.metadata else collections.find(path, "saelens")
    facts = {**(member.facts if member else {})}
    how = facts.get("normalize_activations") or config.get("normalize_activations") or "none"
    if how in {True, "expected_average_only_in"}:
        scaler = read_json(path / SCALER) if (path / SCALER).is_file() else {}
        factor = input_scale or scaler.get("scaling_factor") or facts.get("input_scale")
        if factor is None:
            normalisation.no_scale(path, "normalize_activations=expected_average_only_in")
        foreign.input_scale = float(factor)
        foreign.notes.append(f"trained on activations times {foreign.input_scale:.4g}; the factor is folded in")
    elif how == "covariance_whitening":
        _whiten(foreign, path)
    elif how in {"layer_norm", "constant_norm_rescale"}:
        foreign.normalize = str(how)
        foreign.notes.append(normalisation.per_token(str(how)))
    elif how != "none":
        raise UserError(f"{path}: normalize_activations={how!r} has no counterpart here")
    elif input_scale is not None:
        foreign.input_scale = input_scale
    options = facts.get("model_from_pretrained_kwargs") or foreign.metadata.get("model_from_pretrained_kwargs")
    known = {**(member.metadata if member else {}), **{k: v for k, v in foreign.metadata.items() if v is not None}}
    if foreign.normalize != "layer_norm" and normalisation.is_centred(
        options, known.get("model_name"), known.get("hook_name")
    ):
        if foreign.normalize is not None:
            raise UserError(f"{path}: center_writing_weights together with {how} has no counterpart here")
        foreign.normalize = "center"
        foreign.notes.append(
            "trained on a model with center_writing_weights: each token's mean over the dimensions is subtracted "
            "before encoding and added after decoding; the last latent carries it"
        )


def _whiten(foreign: Foreign, path: Path) -> None:
    if not (path / WHITENING).is_file() or foreign.W_enc is None:
        raise UserError(
            f"{path} was trained on whitened activations, and {WHITENING} is not beside it; get the final SAE, in "
            "which SAELens has folded the whitening"
        )
    shape = (foreign.d_in, foreign.d_in)
    shapes = {"mean": (foreign.d_in,), "matrix": shape, "inverse_matrix": shape}
    t = {name: value for name, value in read_tensors(path / WHITENING).items() if name in shapes}
    checked(t, shapes, path / WHITENING)
    normalisation.fold_whitening(foreign, t["mean"], t["matrix"], t["inverse_matrix"])
    foreign.notes.append("trained on whitened activations; the whitening is folded in")


def _is_flat(config: dict[str, Any]) -> bool:
    version = config.get("sae_lens_version") or config.get("metadata", {}).get("sae_lens_version")
    return "metadata" not in config if not version else int(str(version).split(".")[0]) < 6


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


def _pursuit(config: dict[str, Any], path: Path) -> dict[str, Any]:
    return {
        "n_steps": config.get("max_iterations") or config["d_in"],
        "residual_stop": float(config.get("residual_threshold", 0.01)),
        "stop_on_repeat": flag(config, "stop_on_duplicate_support", True, path),
        "use_b_dec": flag(config, "apply_b_dec_to_input", True, path),
    }


def write(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    """Write any form that SAELens knows."""
    if not form.in_saelens:
        known = ", ".join(TRANSCODERS)
        raise UserError(f"SAELens has no {form.architecture} transcoder, only {known}; convert it for circuit-tracer")
    write_tensors(folder / "sae_weights.safetensors", form.tensors)
    d_sae, d_in = len(form.tensors["W_dec"]), form.tensors["W_dec"].shape[1]
    d_in = d_in if form.d_out is None else len(form.tensors["W_enc"])
    config = {
        "architecture": form.name,
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


FILES = ("cfg.json", *split_files("sae_weights.safetensors"), "sparsity.safetensors", SCALER, WHITENING)
register(Format("saelens", FILES, sniff, read, write, options=("input_scale",), tells_kind=True, holds_targets=True))

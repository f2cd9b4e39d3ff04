"""Folders of public collections as they are downloaded, with tiny tensors: for tests of what is said about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D_IN, D_SAE, K = 16, 40, 4


def weights(d_out: int = D_IN) -> dict[str, Tensor]:
    """A dictionary in SAELens' orientation, every tensor away from zero."""
    torch.manual_seed(5)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, d_out), dim=1)
    encoder = torch.randn(D_IN, D_SAE) if d_out != D_IN else (W_dec + 0.1 * torch.randn(D_SAE, D_IN)).T.contiguous()
    return {"W_enc": encoder, "b_enc": 0.1 * torch.randn(D_SAE), "W_dec": W_dec, "b_dec": torch.randn(d_out)}


def threshold() -> Tensor:
    return torch.linspace(0.1, 0.8, D_SAE)


def put(path: Path, content: Any) -> None:
    """Write ``content`` in the format that the name of ``path`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in content.items()})
    else:
        torch.save(content, path)


def gemma_scope(folder: Path) -> Path:
    """Version 1: five tensors, nothing else."""
    put(folder / "params.npz", {**weights(), "threshold": threshold()})
    return folder


def gemma_scope_2(folder: Path, hook: str, hook_out: str | None = None, **more: Any) -> Path:
    """Version 2: the fields of its published ``config.json``."""
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "width": D_SAE,
        "l0": 20,
        "type": "sae",
    }
    config |= {"hf_hook_point_in": hook, "hf_hook_point_out": hook_out or hook, "affine_connection": False, **more}
    put(folder / "config.json", config)
    w = {name.replace("W_", "w_"): value for name, value in weights().items()}
    put(folder / "params.safetensors", {**w, "threshold": threshold()})
    return folder


def linear(w: dict[str, Tensor]) -> dict[str, Tensor]:
    encoder = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    return {**encoder, "decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}


def llama_scope(folder: Path, hook: str, hook_out: str, **more: Any) -> Path:
    config = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": hook, "hook_point_out": hook_out, "act_fn": "jumprelu"}
    config |= {"jump_relu_threshold": 0.2, "dataset_average_activation_norm": {"in": 10.0, "out": 10.0}, "top_k": 50}
    config |= {"norm_activation": "dataset-wise", "use_decoder_bias": True, "sparsity_include_decoder_norm": True}
    put(folder / "hyperparams.json", {**config, "apply_decoder_bias_to_pre_encoder": False, **more})
    put(folder / "checkpoints" / "final.safetensors", linear(weights()))
    return folder


def llamascopium(folder: Path, hook: str, hook_out: str, norm: float | None = 10.0, **more: Any) -> Path:
    config = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "act_fn": "topk", "top_k": K}
    config |= {"hook_point_in": hook, "hook_point_out": hook_out, "norm_activation": "dataset-wise"}
    config |= {"sparsity_include_decoder_norm": True, "use_decoder_bias": True}
    put(folder / "config.json", {**config, **more})
    w, names = weights(), {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    tensors = {names[name]: value for name, value in w.items()}
    if norm is not None:
        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    put(folder / "sae_weights.safetensors", tensors)
    return folder


def saelens(folder: Path, architecture: str = "standard", hook: str = "blocks.2.hook_resid_pre", **more: Any) -> Path:
    """The present layout; ``metadata`` in ``more`` is added to the metadata."""
    metadata = {
        "sae_lens_version": "6.54.12",
        "hook_name": hook,
        "model_name": "gpt2-small",
        **more.pop("metadata", {}),
    }
    tensors = {**weights(), **more.pop("tensors", {})}
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    put(folder / "cfg.json", {**config, **more, "metadata": metadata})
    put(folder / "sae_weights.safetensors", tensors)
    return folder


def saelens_flat(folder: Path, **more: Any) -> Path:
    """The layout from before version 6."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "activation_fn_str": "relu", "architecture": "standard"}
    config |= {"hook_name": "blocks.2.hook_resid_pre", "model_name": "gpt2-small", "apply_b_dec_to_input": True}
    tensors = {**weights(), **more.pop("tensors", {})}
    put(folder / "cfg.json", {**config, "normalize_activations": "none", "prepend_bos": True, **more})
    put(folder / "sae_weights.safetensors", tensors)
    return folder


def nanda(file: Path, **more: Any) -> Path:
    """A torch file beside the settings of its training, as Kissane et al. publish them."""
    config = {"act_name": "blocks.5.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE, "seq_len": 128, "layer": 5}
    put(file.with_name(file.stem + "_cfg.json"), {**config, "model_name": "gpt2-small", "concat_heads": True, **more})
    put(file, weights())
    return file


def qresearch(file: Path) -> Path:
    put(file, linear(weights()))
    return file


def split(folder: Path, name: str) -> Path:
    """The safetensors file ``name`` of ``folder`` as two, with an index beside them."""
    tensors, stem = load_file(folder / name), name.removesuffix(".safetensors")
    places = {key: f"{stem}-{1 + i % 2:05}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for place in set(places.values()):
        put(folder / place, {key: tensors[key] for key in tensors if places[key] == place})
    put(folder / f"{name}.index.json", {"metadata": {"total_size": 1}, "weight_map": places})
    (folder / name).unlink()
    return folder


def sparsify(folder: Path, **more: Any) -> Path:
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": K, "d_in": D_IN, "transcode": False}
    put(
        folder / "cfg.json",
        {**config, "skip_connection": False, "multi_topk": False, "normalize_decoder": True, **more},
    )
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    put(folder / "sae.safetensors", tensors)
    return folder


def dictionary_learning(folder: Path, **trainer: Any) -> Path:
    buffer = {"d_submodule": D_IN, "io": trainer.pop("io", "out"), "ctx_len": 128}
    about = {"dict_class": "AutoEncoder", "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "tiny"}
    put(folder / "config.json", {"trainer": {**about, **trainer}, "buffer": buffer})
    state = linear(weights())
    put(folder / "ae.pt", {**{k: v for k, v in state.items() if k != "decoder.bias"}, "bias": state["decoder.bias"]})
    return folder


def qwen_scope(folder: Path, layer: int = 7) -> Path:
    w = weights()
    put(folder / f"layer{layer}.sae.pt", {**w, "W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()})
    return folder / f"layer{layer}.sae.pt"


def goodfire(path: Path) -> Path:
    put(path, {name.replace(".", "_linear."): value for name, value in linear(weights()).items()})
    return path


def openai(path: Path, **more: Any) -> Path:
    w = weights()
    state = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "pre_bias": w["b_dec"]}
    state |= {"latent_bias": w["b_enc"], "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    put(path, {**state, **more})
    return path


def overcomplete(path: Path) -> Path:
    w = weights()
    encoder = {"encoder.final_block.0.weight": w["W_enc"].T, "encoder.final_block.0.bias": w["b_enc"]}
    put(path, {"dictionary._weights": w["W_dec"], "thresholds": torch.full((D_SAE,), 0.3).log(), **encoder})
    return path


def cached(root: Path, repository: str) -> Path:
    """The folder of ``owner/name`` in huggingface_hub's cache, where files are links to blobs."""
    return root / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / ("a1" * 20)


def into_blobs(folder: Path, snapshot: Path) -> None:
    """Replace the files below ``folder`` by links to blobs, as huggingface_hub does."""
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = blobs / f"{number:064x}"
        file.rename(blob)
        file.symlink_to(blob)


Maker = Callable[[Path], Path]

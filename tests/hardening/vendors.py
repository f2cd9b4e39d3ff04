"""Small SAEs in the files of every tool whose SAEs are read, for tests that damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 4, 6, 2


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1)
    b_enc, b_dec = 0.1 * torch.randn(D_SAE), torch.randn(D_IN)
    return {"W_enc": W_dec.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def linear(**more: Tensor) -> dict[str, Tensor]:
    """The encoder and decoder as two ``nn.Linear``."""
    w = weights()
    encoder = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    return {**encoder, "decoder.weight": w["W_dec"].T.contiguous(), **more}


def write(path: Path, content: Any) -> Path:
    """``content`` in the format that the name of ``path`` says; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in content.items()})
    else:
        torch.save(content, path)
    return path.parent


def saelens(folder: Path) -> Path:
    metadata = {"sae_lens_version": "6.5.0", "hook_name": "blocks.1.hook_mlp_out"}
    config = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": metadata}
    write(folder / "cfg.json", {**config, "apply_b_dec_to_input": False, "normalize_activations": "none"})
    return write(folder / "sae_weights.safetensors", {**weights(), "threshold": torch.full((D_SAE,), 0.3)})


def saelens_flat(folder: Path) -> Path:
    flat = {"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    write(folder / "cfg.json", {**flat, "hook_point": "blocks.1.hook_mlp_out", "model_name": "tiny"})
    return write(folder / "sae_weights.safetensors", weights())


def sparsify(folder: Path) -> Path:
    w = weights()
    write(folder / "cfg.json", {"activation": "topk", "num_latents": 0, "k": K, "d_in": D_IN})
    del (tensors := linear())["decoder.weight"]
    return write(folder / "sae.safetensors", {**tensors, "W_dec": w["W_dec"], "b_dec": w["b_dec"]})


def gemma_scope(folder: Path) -> Path:
    return write(folder / "params.npz", {**weights(), "threshold": torch.full((D_SAE,), 0.3)})


def gemma_scope_2(folder: Path) -> Path:
    tensors = {name.replace("W_", "w_"): value for name, value in weights().items()}
    return write(folder / "params.safetensors", {**tensors, "threshold": torch.full((D_SAE,), 0.3)})


def llama_scope(folder: Path) -> Path:
    write(folder / "checkpoints" / "final.safetensors", linear(**{"decoder.bias": weights()["b_dec"]}))
    hyper = {"dataset_average_activation_norm": {"in": 10.0}, "jump_relu_threshold": 0.5, "d_sae": D_SAE}
    return write(folder / "hyperparams.json", {**hyper, "hook_point_in": "blocks.1.hook_mlp_out"})


def llamascopium(folder: Path) -> Path:
    w, names = weights(), {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    write(folder / "sae_weights.safetensors", {names[name]: value for name, value in w.items()})
    return write(
        folder / "config.json",
        {"act_fn": "topk", "top_k": K, "norm_activation": "inference", "hook_point_in": "blocks.1.hook_mlp_out"},
    )


def qwen_scope(folder: Path) -> Path:
    w = weights()
    turned = {**w, "W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()}
    return write(folder / f"L0_{K}" / "layer1.sae.pt", turned) / "layer1.sae.pt"


def dictionary_learning(folder: Path) -> Path:
    state = linear(b_dec=weights()["b_dec"], k=torch.tensor(K), threshold=torch.tensor(0.3))
    write(folder / "config.json", {"trainer": {"dict_class": "BatchTopKSAE", "layer": 1, "lm_name": "tiny"}})
    return write(folder / "ae.pt", state)


def openai(folder: Path) -> Path:
    w = weights()
    state = {"latent_bias": w["b_enc"], "pre_bias": w["b_dec"], "activation": "TopK", "activation_state_dict": {"k": K}}
    tensors = {name: value for name, value in linear().items() if name != "encoder.bias"}
    return write(folder / "sae.pt", {**tensors, **state}) / "sae.pt"


def goodfire(folder: Path) -> Path:
    state = linear(**{"decoder.bias": weights()["b_dec"]})
    return (
        write(folder / "good.pth", {name.replace(".", "_linear."): value for name, value in state.items()}) / "good.pth"
    )


def overcomplete(folder: Path) -> Path:
    w = weights()
    state = {"dictionary._weights": 3 * w["W_dec"], "thresholds": torch.full((D_SAE,), 0.3).log()}
    encoder = {"encoder.final_block.0.weight": w["W_enc"].T.contiguous(), "encoder.final_block.0.bias": w["b_enc"]}
    return write(folder / "sae.pt", {**state, **encoder}) / "sae.pt"


# Each writes its files into a folder and returns what is to be loaded.
VENDORS: dict[str, Callable[[Path], Path]] = {
    maker.__name__: maker
    for maker in (
        saelens,
        saelens_flat,
        sparsify,
        gemma_scope,
        gemma_scope_2,
        llama_scope,
        llamascopium,
        qwen_scope,
        dictionary_learning,
        openai,
        goodfire,
        overcomplete,
    )
}

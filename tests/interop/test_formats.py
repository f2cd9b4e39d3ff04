"""Every format, written by hand here in its own layout, read back against the formula its tool documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab.interop import detect, load, read
from tests.interop.examples import D_IN, D_SAE, probe

EXACT = {"rtol": 1e-4, "atol": 1e-5}  # float32 against float32, sums of 16 products, thresholds away from the values


def weights() -> dict[str, Tensor]:
    """A dictionary in our orientation with biases that matter."""
    torch.manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1)
    return {
        "W_enc": (W_dec + 0.1 * torch.randn(D_SAE, D_IN)).T.contiguous(),
        "b_enc": 0.1 * torch.randn(D_SAE),
        "W_dec": W_dec,
        "b_dec": torch.randn(D_IN),
    }


def topk(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def check(path: Path, codes: Tensor, recon: Tensor, form: str, **options: Any) -> None:
    assert detect(path).name == form
    sae = load(path, **options)
    code = sae.encode(probe())
    torch.testing.assert_close(code.dense()[:, :D_SAE], codes, **EXACT)
    torch.testing.assert_close(sae.decode(code), recon, **EXACT)


def linear(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
    }


@pytest.mark.parametrize("k", [4, 7])
def test_sparsify_with_its_default_width_of_zero(k: int, tmp_path: Path) -> None:
    w, x = weights(), probe()
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file({**tensors, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}, tmp_path / "sae.safetensors")
    write_json(tmp_path / "cfg.json", {"activation": "topk", "num_latents": 0, "k": k, "d_in": D_IN})
    f = topk((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], k)
    check(tmp_path, f, f @ w["W_dec"] + w["b_dec"], "sparsify")
    assert "num_latents is 0" in read(tmp_path).notes[0]


def test_openai_topk_reads_layer_normed_activations(tmp_path: Path) -> None:
    w, x = weights(), probe()
    state = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "latent_bias": w["b_enc"],
        "pre_bias": w["b_dec"],
        "activation": "TopK",
        "activation_state_dict": {"k": 5},
    }
    torch.save(state, tmp_path / "v5.pt")
    mean = x.mean(dim=1, keepdim=True)
    std = (x - mean).std(dim=1, keepdim=True)  # Bessel-corrected, as in OpenAI's code
    f = topk(((x - mean) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 5)
    recon = (f @ w["W_dec"] + w["b_dec"]) * std + mean
    check(tmp_path / "v5.pt", f * std, recon, "openai")


def test_gemma_scope_one_and_two(tmp_path: Path) -> None:
    w, x = weights(), probe()
    threshold = torch.full((D_SAE,), 0.3)
    pre = x @ w["W_enc"] + w["b_enc"]
    f = pre * (pre > threshold)
    one = tmp_path / "gemma-scope-9b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    one.mkdir(parents=True)
    np.savez(one / "params.npz", **{k: v.numpy() for k, v in {**w, "threshold": threshold}.items()})
    check(one, f, f @ w["W_dec"] + w["b_dec"], "gemma_scope")
    assert read(one).metadata["hook_name"] == "blocks.20.hook_resid_post"
    two = tmp_path / "two"
    two.mkdir()
    lower = {name.replace("W_", "w_"): value for name, value in w.items()}
    save_file({**lower, "threshold": threshold}, two / "params.safetensors")
    check(two, f, f @ w["W_dec"] + w["b_dec"], "gemma_scope")


def test_llama_scope_scales_its_input(tmp_path: Path) -> None:
    w, x = weights(), probe()
    (tmp_path / "checkpoints").mkdir()
    tensors = {**linear(w), "decoder.bias": w["b_dec"]}
    save_file(tensors, tmp_path / "checkpoints" / "final.safetensors")
    norm = 10.0
    hyper = {"dataset_average_activation_norm": {"in": norm}, "jump_relu_threshold": 0.5, "d_sae": D_SAE}
    write_json(tmp_path / "hyperparams.json", {**hyper, "d_model": D_IN, "hook_point_in": "blocks.3.hook_resid_post"})
    scale = D_IN**0.5 / norm
    pre = (x * scale) @ w["W_enc"] + w["b_enc"]
    f = pre * (pre > 0.5 * scale)
    check(tmp_path, f / scale, (f @ w["W_dec"] + w["b_dec"]) / scale, "llama_scope")


def test_qwen_scope_and_goodfire(tmp_path: Path) -> None:
    w, x = weights(), probe()
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_6"
    folder.mkdir()
    transposed = {**w, "W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()}
    torch.save(transposed, folder / "layer7.sae.pt")
    pre = x @ w["W_enc"] + w["b_enc"]
    f = topk(pre, 6)
    check(folder / "layer7.sae.pt", f, f @ w["W_dec"] + w["b_dec"], "qwen_scope")
    assert read(folder / "layer7.sae.pt").metadata["hook_name"] == "blocks.7.hook_resid_post"
    good = {**linear(w), "decoder.bias": w["b_dec"]}
    torch.save({k.replace("coder.", "coder_linear."): v for k, v in good.items()}, tmp_path / "good.pth")
    check(tmp_path / "good.pth", pre.relu(), pre.relu() @ w["W_dec"] + w["b_dec"], "goodfire")


def test_llamascopium_has_saelens_file_name_and_other_tensors(tmp_path: Path) -> None:
    w, x = weights(), probe()
    save_file(
        {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]},
        tmp_path / "sae_weights.safetensors",
    )
    write_json(
        tmp_path / "config.json",
        {"act_fn": "topk", "top_k": 5, "norm_activation": "inference", "hook_point_in": "blocks.2.hook_resid_post"},
    )
    f = topk(x @ w["W_enc"] + w["b_enc"], 5)
    check(tmp_path, f, f @ w["W_dec"] + w["b_dec"], "llamascopium")


def test_dictionary_learning_classes(tmp_path: Path) -> None:
    w, x = weights(), probe()
    centred = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    plain = x @ w["W_enc"] + w["b_enc"]
    extra = {"r_mag": 0.1 * torch.randn(D_SAE), "mag_bias": 0.1 * torch.randn(D_SAE)}
    h = (x - w["b_dec"]) @ w["W_enc"]
    gated = (h + w["b_enc"] > 0) * (extra["r_mag"].exp() * h + extra["mag_bias"]).relu()
    pair = {k: v for k, v in linear(w).items() if k != "encoder.bias"}
    jump = {**w, "threshold": torch.full((D_SAE,), 0.4)}
    budget = {"k": torch.tensor(4), "threshold": torch.tensor(0.4)}
    cases: dict[str, tuple[dict[str, Any], Tensor]] = {
        "AutoEncoder": ({**linear(w), "bias": w["b_dec"]}, centred.relu()),
        "AutoEncoderNew": ({**linear(w), "decoder.bias": w["b_dec"]}, plain.relu()),
        "GatedAutoEncoder": ({**pair, "decoder_bias": w["b_dec"], "gate_bias": w["b_enc"], **extra}, gated),
        "AutoEncoderTopK": (
            {**linear(w), "b_dec": w["b_dec"], **budget, "threshold": torch.tensor(-1.0)},
            topk(centred, 4),
        ),
        "BatchTopKSAE": ({**linear(w), "b_dec": w["b_dec"], **budget}, centred * (centred > 0.4)),
        "MatryoshkaBatchTopKSAE": ({**w, **budget, "group_sizes": torch.tensor([20, 20])}, centred * (centred > 0.4)),
        "JumpReluAutoEncoder": (jump, plain * (plain > 0.4)),
    }
    for name, (state, f) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        torch.save(state, folder / "ae.pt")
        write_json(
            folder / "config.json", {"trainer": {"dict_class": name, "layer": 3, "lm_name": "tiny"}, "buffer": {}}
        )
        check(folder, f, f @ w["W_dec"] + w["b_dec"], "dictionary_learning")


def test_dictionary_learning_backup_folds_its_norm_factor(tmp_path: Path) -> None:
    w, x = weights(), probe()
    state = {**linear(w), "b_dec": w["b_dec"], "k": torch.tensor(4), "threshold": torch.tensor(-1.0)}
    torch.save({"step": 10, "ae": state, "optimizer": {}, "config": {}, "norm_factor": 2.5}, tmp_path / "ae.pt")
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": "AutoEncoderTopK"}})
    f = topk((x / 2.5 - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 4)
    check(tmp_path, f * 2.5, (f @ w["W_dec"] + w["b_dec"]) * 2.5, "dictionary_learning")
    assert any("backup" in note for note in read(tmp_path).notes)


@pytest.mark.parametrize(("k", "pursuit"), [(5, False), (None, False), (3, True)])
def test_overcomplete_state_dicts(k: int | None, pursuit: bool, tmp_path: Path) -> None:
    w, x = weights(), probe()
    raw = 3 * w["W_dec"]  # normalised on use
    state = {"dictionary._weights": raw, "dictionary.multiplier": torch.tensor(0.2)}
    state |= {"encoder.final_block.0.weight": w["W_enc"].T.contiguous(), "encoder.final_block.0.bias": w["b_enc"]}
    torch.save(state, tmp_path / "sae.pt")
    D = w["W_dec"] * torch.tensor(0.2).exp()
    pre = x @ w["W_enc"] + w["b_enc"]
    if pursuit:
        f, r = torch.zeros(x.shape[0], D_SAE), x.clone()
        for _ in range(3):
            c, j = (r @ D.T).relu().max(dim=1)
            f[torch.arange(len(x)), j] += c
            r -= c[:, None] * D[j]
    else:
        f = pre.relu() if k is None else topk(pre, k)
    check(tmp_path / "sae.pt", f, f @ D, "overcomplete", k=k, pursuit=pursuit)


def test_old_flat_saelens_configuration(tmp_path: Path) -> None:
    w, x = weights(), probe()
    save_file(w, tmp_path / "sae_weights.safetensors")
    flat = {"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    write_json(tmp_path / "cfg.json", {**flat, "hook_point": "blocks.5.hook_resid_pre", "model_name": "tiny"})
    f = topk((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 4)
    check(tmp_path, f, f @ w["W_dec"] + w["b_dec"], "saelens")
    assert read(tmp_path).metadata == {"hook_name": "blocks.5.hook_resid_pre", "model_name": "tiny"}

"""Every format with an SAE of odd widths, decoder rows of other norms than 1, all biases away from 0, and tensors in
bfloat16: codes and reconstructions are those of the format's formula in double precision, also after each export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.interop import detect, load
from saelab.interop.conversion import export, writers
from saelab.sae.weights import load_sae, save
from tests.interop.collected import put

D_IN, D_SAE, K = 37, 91, 5
HOOK = "blocks.3.hook_resid_post"


class Case(NamedTuple):
    path: Path
    codes: Tensor
    recon: Tensor
    options: dict[str, Any] | None = None


def bf16(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return (mean + std * torch.randn(*shape)).bfloat16()


def weights() -> dict[str, Tensor]:
    """In SAELens' orientation; what fires often and what seldom, and norms from 0.3 to 3."""
    torch.manual_seed(11)
    norms = torch.logspace(-0.5, 0.5, D_SAE)[torch.randperm(D_SAE)]
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1)
    return {
        "W_enc": (rows + 0.1 * torch.randn(D_SAE, D_IN)).T.bfloat16(),
        "b_enc": bf16(D_SAE, mean=0.2, std=0.3),
        "W_dec": (rows * norms[:, None]).bfloat16(),
        "b_dec": bf16(D_IN, mean=0.3, std=0.7),
    }


def probe() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 0.4 + 2 * torch.randn(128, D_IN, generator=generator)


W = weights()
X = probe().double()
THRESHOLD = torch.logspace(-1, 0.5, D_SAE).bfloat16()
w = {name: value.double() for name, value in W.items()}
norms = w["W_dec"].norm(dim=1)
T = THRESHOLD.double()


def linear(encoder: str = "encoder", decoder: str = "decoder", bias: bool = True) -> dict[str, Tensor]:
    named = {f"{encoder}.weight": W["W_enc"].T, f"{encoder}.bias": W["b_enc"], f"{decoder}.weight": W["W_dec"].T}
    return named | ({f"{decoder}.bias": W["b_dec"]} if bias else {})


def pre(x: Tensor = X, subtract: bool = False) -> Tensor:
    return (x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]


def topk(u: Tensor, k: int = K, by: Tensor | float = 1.0, signed: bool = False) -> Tensor:
    scores = (u * by).abs() if signed else u * by
    chosen = torch.zeros_like(u).scatter(1, scores.topk(k, dim=1).indices, 1.0)
    return chosen * (u if signed else u.relu())


def decoded(f: Tensor) -> Tensor:
    return f @ w["W_dec"] + w["b_dec"]


def saelens(folder: Path, architecture: str, tensors: dict[str, Tensor] | None = None, **more: Any) -> Path:
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "normalize_activations": "none"}
    config |= {"apply_b_dec_to_input": False, "metadata": {"sae_lens_version": "6.54.12", "hook_name": HOOK}}
    put(folder / "cfg.json", {**config, **more})
    put(folder / "sae_weights.safetensors", W if tensors is None else tensors)
    return folder


def saelens_standard(folder: Path) -> Case:
    f = pre(subtract=True).relu()
    return Case(saelens(folder, "standard", apply_b_dec_to_input=True), f, decoded(f))


def saelens_topk(folder: Path) -> Case:
    f = topk(pre())
    return Case(saelens(folder, "topk", k=K), f, decoded(f))


def saelens_topk_by_norm(folder: Path) -> Case:
    f = topk(pre() * norms)
    return Case(saelens(folder, "topk", k=K, rescale_acts_by_decoder_norm=True), f, decoded(f / norms))


def saelens_abstopk(folder: Path) -> Case:
    f = topk(pre(subtract=True), signed=True)
    return Case(saelens(folder, "abstopk", k=K, apply_b_dec_to_input=True), f, decoded(f))


def saelens_jumprelu(folder: Path) -> Case:
    f = pre() * (pre() > T)
    return Case(saelens(folder, "jumprelu", {**W, "threshold": THRESHOLD}), f, decoded(f))


def saelens_gated(folder: Path) -> Case:
    r, b = bf16(D_SAE, std=0.3), bf16(D_SAE, mean=-0.2, std=0.3)
    tensors = {name: value for name, value in W.items() if name != "b_enc"}
    path = saelens(folder, "gated", {**tensors, "b_gate": W["b_enc"], "r_mag": r, "b_mag": b})
    f = (pre() > 0) * (r.double().exp() * (X @ w["W_enc"]) + b.double()).relu()
    return Case(path, f, decoded(f))


def saelens_checkpoint(folder: Path) -> Case:
    tensors = {**W, "topk_threshold": torch.tensor(0.8, dtype=torch.float64)}
    path = saelens(folder, "batchtopk", tensors, k=float(K), rescale_acts_by_decoder_norm=True)
    f = pre() * norms * (pre() * norms > 0.8)
    return Case(path, f, decoded(f / norms))


def sparsify(folder: Path, signed: bool = False) -> Case:
    put(folder / "cfg.json", {"activation": "topk", "num_latents": 0, "k": K, "signed": signed, "transcode": False})
    tensors = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}
    put(folder / "sae.safetensors", tensors)
    f = topk(pre(subtract=True), signed=signed)
    return Case(folder, f, decoded(f))


def sparsify_signed(folder: Path) -> Case:
    return sparsify(folder, True)


def dictionary_learning(folder: Path, name: str, tensors: dict[str, Any], f: Tensor, **more: Any) -> Case:
    trainer = {"dict_class": name, "layer": 3, "submodule_name": "resid_post_layer_3", **more}
    put(folder / "config.json", {"trainer": trainer, "buffer": {}})
    put(folder / "ae.pt", tensors)
    return Case(folder, f, decoded(f))


def auto_encoder(folder: Path) -> Case:
    tensors = linear(bias=False) | {"bias": W["b_dec"]}
    return dictionary_learning(folder, "AutoEncoder", tensors, pre(subtract=True).relu())


def auto_encoder_new(folder: Path) -> Case:
    return dictionary_learning(folder, "AutoEncoderNew", linear(), pre().relu())


def gated_auto_encoder(folder: Path) -> Case:
    torch.manual_seed(4)
    r, b = bf16(D_SAE, std=0.3), bf16(D_SAE, mean=-0.2, std=0.3)
    tensors = {name: value for name, value in linear(bias=False).items() if name != "encoder.bias"}
    tensors |= {"decoder_bias": W["b_dec"], "gate_bias": W["b_enc"], "mag_bias": b, "r_mag": r}
    bare = (X - w["b_dec"]) @ w["W_enc"]
    f = (bare + w["b_enc"] > 0) * (r.double().exp() * bare + b.double()).relu()
    return dictionary_learning(folder, "GatedAutoEncoder", tensors, f)


def auto_encoder_topk(folder: Path) -> Case:
    tensors = linear(bias=False) | {"b_dec": W["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(0.1)}
    return dictionary_learning(folder, "AutoEncoderTopK", tensors, topk(pre(subtract=True)), k=K)


def batch_topk(folder: Path) -> Case:
    tensors = linear(bias=False) | {"b_dec": W["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(0.75)}
    u = pre(subtract=True)
    return dictionary_learning(folder, "BatchTopKSAE", tensors, u * (u > 0.75), k=K)


def matryoshka(folder: Path) -> Case:
    tensors = {**W, "k": torch.tensor(K), "threshold": torch.tensor(0.75), "group_sizes": torch.tensor([50, 41])}
    u = pre(subtract=True)
    return dictionary_learning(folder, "MatryoshkaBatchTopKSAE", tensors, u * (u > 0.75), k=K)


def jump_relu(folder: Path) -> Case:
    return dictionary_learning(folder, "JumpReluAutoEncoder", {**W, "threshold": THRESHOLD}, pre() * (pre() > T))


def gemma_scope(folder: Path) -> Case:
    path = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_1k" / "average_l0_9"
    put(path / "params.npz", {name: value.float() for name, value in {**W, "threshold": THRESHOLD}.items()})
    f = pre() * (pre() > T)
    return Case(path, f, decoded(f))


def gemma_scope_2(folder: Path) -> Case:
    config = {"architecture": "jump_relu", "type": "sae", "hf_hook_point_in": "model.layers.3.output"}
    put(folder / "config.json", config | {"hf_hook_point_out": "model.layers.3.output"})
    tensors = {name.replace("W_", "w_"): value for name, value in W.items()}
    put(folder / "params.safetensors", {**tensors, "threshold": THRESHOLD})
    f = pre() * (pre() > T)
    return Case(folder, f, decoded(f))


def llama_scope(folder: Path, **more: Any) -> Case:
    """As its tool folds the scale in for inference: the bias divided, the dictionary as it is, then a jump."""
    config = {"hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "jumprelu", "jump_relu_threshold": 0.9}
    config |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 17.0, "out": 17.0}}
    put(folder / "hyperparams.json", {**config, "apply_decoder_bias_to_pre_encoder": False, **more})
    put(folder / "checkpoints" / "final.safetensors", linear())
    scale = D_IN**0.5 / 17
    u = X @ w["W_enc"] + w["b_enc"] / scale
    by = norms if more.get("sparsity_include_decoder_norm", True) else 1.0
    f = u * (u * by > 0.9)
    return Case(folder, f, f @ w["W_dec"] + w["b_dec"] / scale)


def llama_scope_by_norm(folder: Path) -> Case:
    return llama_scope(folder, sparsity_include_decoder_norm=True)


def llama_scope_without_norm(folder: Path) -> Case:
    return llama_scope(folder, sparsity_include_decoder_norm=False)


def llamascopium(folder: Path, act: str, by_norm: bool) -> Case:
    config = {"sae_type": "sae", "act_fn": act, "top_k": K, "hook_point_in": HOOK, "hook_point_out": HOOK}
    config |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": by_norm, "use_decoder_bias": True}
    put(folder / "config.json", config)
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    tensors = {names[name]: value for name, value in W.items()}
    level = THRESHOLD.log()
    tensors |= {f"dataset_average_activation_norm.{HOOK}": torch.tensor(17.0).bfloat16()}
    tensors |= {"activation_function.log_jumprelu_threshold": level} if act == "jumprelu" else {}
    put(folder / "sae_weights.safetensors", tensors)
    scale = D_IN**0.5 / 17
    u, by = pre(X * scale), norms if by_norm else torch.ones(D_SAE)
    f = {"relu": u.relu(), "jumprelu": u * (u * by > level.double().exp()), "topk": topk(u, by=by)}[act]
    # A TopK of activations times norm has the codes of the dictionary with unit rows.
    return Case(folder, f * (by if act == "topk" else 1.0) / scale, decoded(f) / scale)


def llamascopium_cases() -> dict[str, Callable[[Path], Case]]:
    return {
        f"llamascopium {act}{' by norm' * by_norm}": lambda folder, act=act, by_norm=by_norm: llamascopium(
            folder, act, by_norm
        )
        for act in ("relu", "topk", "jumprelu")
        for by_norm in (False, True)
    }


def openai(folder: Path, topk_: bool = True) -> Case:
    tensors: dict[str, Any] = linear(bias=False)
    tensors |= {"latent_bias": tensors.pop("encoder.bias"), "pre_bias": W["b_dec"]}
    tensors |= {"activation": "TopK", "activation_state_dict": {"k": K}} if topk_ else {"activation": "ReLU"}
    put(folder / "0.pt", tensors)
    if not topk_:
        f = pre(subtract=True).relu()
        return Case(folder / "0.pt", f, decoded(f))
    mean, std = X.mean(dim=1, keepdim=True), X.std(dim=1, keepdim=True) + 1e-5
    f = topk(pre((X - mean) / std, subtract=True))
    return Case(folder / "0.pt", f * std, decoded(f) * std + mean)


def openai_relu(folder: Path) -> Case:
    return openai(folder, False)


def overcomplete(folder: Path, **options: Any) -> Case:
    tensors = {"dictionary._weights": W["W_dec"], "encoder.final_block.0.weight": W["W_enc"].T}
    tensors |= {"encoder.final_block.0.bias": W["b_enc"], "dictionary.multiplier": torch.tensor(0.3).bfloat16()}
    put(folder / "sae.pt", tensors)
    rules = {"k": lambda u: topk(u), "threshold": lambda u: u * (u >= 0.75)}
    f = rules[next(iter(options))](pre()) if options else pre().relu()
    rows = w["W_dec"] / norms[:, None] * torch.tensor(0.3).bfloat16().double().exp()
    return Case(folder / "sae.pt", f, f @ rows, options)


def overcomplete_topk(folder: Path) -> Case:
    return overcomplete(folder, k=K)


def overcomplete_batch_topk(folder: Path) -> Case:
    return overcomplete(folder, threshold=0.75)


def qwen_scope(folder: Path) -> Case:
    path = folder / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer3.sae.pt"
    put(path, {**W, "W_enc": W["W_enc"].T, "W_dec": W["W_dec"].T})
    f = topk(pre())
    return Case(path, f, decoded(f))


def goodfire(folder: Path) -> Case:
    put(folder / "good.pth", linear("encoder_linear", "decoder_linear"))
    return Case(folder / "good.pth", pre().relu(), decoded(pre().relu()))


def qresearch(folder: Path) -> Case:
    put(folder / "Llama-3.2-1B-SAE-l3.pt", linear())
    return Case(folder / "Llama-3.2-1B-SAE-l3.pt", pre().relu(), decoded(pre().relu()))


def nanda(folder: Path) -> Case:
    put(folder / "run.pt", W)
    put(folder / "run_cfg.json", {"act_size": D_IN, "act_name": HOOK})
    f = pre(subtract=True).relu()
    return Case(folder / "run.pt", f, decoded(f))


MAKERS: Sequence[Callable[[Path], Case]] = [
    saelens_standard, saelens_topk, saelens_topk_by_norm, saelens_abstopk, saelens_jumprelu, saelens_gated,
    saelens_checkpoint, sparsify, sparsify_signed, auto_encoder, auto_encoder_new, gated_auto_encoder,
    auto_encoder_topk, batch_topk, matryoshka, jump_relu, gemma_scope, gemma_scope_2, llama_scope,
    llama_scope_by_norm, llama_scope_without_norm, openai, openai_relu, overcomplete, overcomplete_topk,
    overcomplete_batch_topk, qwen_scope, goodfire, qresearch, nanda,
]  # fmt: skip
CASES = {maker.__name__: maker for maker in MAKERS} | llamascopium_cases()


def agree(sae: Any, case: Case, what: str) -> None:
    x = probe()
    code = sae.encode(x)
    found, recon = code.dense().double(), sae.reconstruct(x, code).double()
    if found.shape[1] == 2 * D_SAE:  # a signed dictionary in a format without signs
        found = found[:, :D_SAE] - found[:, D_SAE:]
    found = found[:, :D_SAE]
    close = (found - case.codes).abs() <= 1e-4 * case.codes.abs().max()
    # A value on its threshold, or a tie for the last place, may go either way by rounding.
    rows = close.all(dim=1)
    assert rows.double().mean() > 0.98, what
    assert (recon - case.recon)[rows].norm() <= 1e-4 * case.recon[rows].norm(), what


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstructions_are_those_of_the_formula(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path / "theirs")
    shares = (case.codes != 0).double().mean()
    assert 0.01 < shares < 0.95, "something fires, something does not"
    sae = load(case.path, **(case.options or {}))
    agree(sae, case, "as read")
    save(sae, tmp_path / "ours")
    agree(load_sae(tmp_path / "ours"), case, "as a run")
    written = []
    for to in writers():
        try:
            export(sae, tmp_path / to, to)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert detect(tmp_path / to).name.replace("_", "-") == to
        agree(load(tmp_path / to), case, f"exported to {to}")
        written.append(to)
    assert "saelens" in written


@torch.no_grad()
@pytest.mark.parametrize("by_norm", [True, False])
def test_a_threshold_of_llama_scopes_transcoders_is_in_units_of_what_they_write(by_norm: bool, tmp_path: Path) -> None:
    """As its tool folds two scales in for inference: ``b_E / in``, ``W_D * in / out``, ``b_D / out``, then a jump."""
    case = llama_scope(tmp_path, sparsity_include_decoder_norm=by_norm, hook_point_in="blocks.3.ln2.hook_normalized",
                       hook_point_out="blocks.3.hook_mlp_out",
                       dataset_average_activation_norm={"in": 17.0, "out": 3.0})  # fmt: skip
    scale, scale_out = D_IN**0.5 / 17, D_IN**0.5 / 3
    u, W_dec = X @ w["W_enc"] + w["b_enc"] / scale, w["W_dec"] * scale / scale_out
    f = u * (u * (W_dec.norm(dim=1) if by_norm else 1.0) > 0.9)
    assert 0.01 < (f != 0).double().mean() < 0.9
    # Its codes here are in units of the target, so that the dictionary stays as it is.
    expected = Case(case.path, f * scale / scale_out, f @ W_dec + w["b_dec"] / scale_out)
    agree(load(case.path), expected, "a transcoder")

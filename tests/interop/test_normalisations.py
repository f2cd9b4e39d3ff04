"""Normalisations of activations are applied or refused: against float64 formulas, and against SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.interop import export, load, read
from saelab.sae import Normalised
from tests.interop import collected
from tests.interop.collected import D_IN, D_SAE, K, put, threshold, weights

# float32 against float64: values of order 10, sums of 16 products.
EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def probe(n: int = 200) -> Tensor:
    """Activations with a mean over the dimensions and norms that vary from token to token."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(n, D_IN, generator=generator, dtype=torch.float64)
    return 3 * torch.rand(n, 1, generator=generator, dtype=torch.float64) * x + 2 * torch.randn(
        n, 1, generator=generator, dtype=torch.float64
    )


def double() -> dict[str, Tensor]:
    return {name: value.double() for name, value in weights().items()}


def relu_sae(x: Tensor, w: dict[str, Tensor], subtract: bool = True) -> tuple[Tensor, Tensor]:
    f = ((x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]).relu()
    return f, f @ w["W_dec"] + w["b_dec"]


def check(path: Path, codes: Tensor, recon: Tensor, **options: Any) -> None:
    sae, x = load(path, **options), probe().float()
    code = sae.encode(x)
    torch.testing.assert_close(code.dense()[:, :D_SAE], codes.float(), **EXACT)
    torch.testing.assert_close(sae.decode(code), recon.float(), **EXACT)
    torch.testing.assert_close(sae(x[:1]), recon[:1].float(), **EXACT)  # does not depend on the other tokens


def test_layer_norm(tmp_path: Path) -> None:
    x, w = probe(), double()
    mean = x.mean(1, keepdim=True)
    std = (x - mean).std(1, keepdim=True)
    f, y = relu_sae((x - mean) / (std + 1e-5), w)
    check(collected.saelens(tmp_path, normalize_activations="layer_norm"), f * std, y * std + mean)
    assert any("layer_norm" in note for note in read(tmp_path).notes)


@pytest.mark.parametrize("subtract", [True, False])
def test_constant_norm_rescale(subtract: bool, tmp_path: Path) -> None:
    x, w = probe(), double()
    scale = x.norm(dim=1, keepdim=True) / D_IN**0.5
    f, y = relu_sae(x / scale, w, subtract)
    more = {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": subtract}
    check(collected.saelens(tmp_path, **more), f * scale, y * scale)
    assert any("constant_norm_rescale" in note for note in read(tmp_path).notes)


def test_a_zero_token_is_harmless(tmp_path: Path) -> None:
    sae = load(collected.saelens(tmp_path, normalize_activations="constant_norm_rescale"))
    assert sae(torch.zeros(1, D_IN)).isfinite().all()


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("make", [collected.saelens, collected.saelens_flat])
def test_center_writing_weights(make: Any, subtract: bool, tmp_path: Path) -> None:
    x, w = probe(), double()
    mean = x.mean(1, keepdim=True)
    f, y = relu_sae(x - mean, w, subtract)
    options = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    more = {"metadata": options} if make is collected.saelens else options
    check(make(tmp_path, apply_b_dec_to_input=subtract, **more), f, y + mean)
    assert any("center_writing_weights" in note for note in read(tmp_path).notes)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_a_centred_sae_can_be_folded_for_training(architecture: str, subtract: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}
    tensors = {"jumprelu": {"threshold": threshold()}}.get(architecture, {})
    if architecture == "gated":
        tensors = {"b_gate": weights()["b_enc"], "r_mag": threshold() - 0.4, "b_mag": 0.3 * threshold()}
    path = collected.saelens(tmp_path, architecture, k=K, apply_b_dec_to_input=subtract, tensors=tensors, **options)
    sae, x = load(path), probe().float()
    assert isinstance(sae, Normalised)
    folded = sae.folded()
    assert folded is not None and folded.d_sae == D_SAE and not isinstance(folded, Normalised)
    torch.testing.assert_close(folded.encode(x).dense(), sae.encode(x).dense()[:, :D_SAE], **EXACT)
    torch.testing.assert_close(folded(x), sae(x) - x.mean(1, keepdim=True), **EXACT)
    assert load(collected.saelens(tmp_path, normalize_activations="layer_norm")).folded() is None  # pyright: ignore


@pytest.mark.parametrize(
    ("hook", "model", "centred"),
    [
        ("blocks.3.hook_mlp_out", "gpt2-small", True),
        ("blocks.3.attn.hook_z", "gpt2-small", False),  # what a head reads or computes is not what it writes
        ("blocks.3.mlp.hook_post", "pythia-70m", False),
        ("blocks.3.hook_resid_post", "gemma-2-2b", False),  # TransformerLens does not centre models with RMSNorm
    ],
)
def test_what_is_centred_depends_on_hook_and_model(hook: str, model: str, centred: bool, tmp_path: Path) -> None:
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "model_name": model}
    found = read(collected.saelens(tmp_path, hook=hook, metadata=metadata))
    assert (found.normalize == "center") is centred


@pytest.mark.parametrize("make", [collected.saelens, collected.saelens_flat])
def test_an_unknown_scale_is_refused_until_it_is_given(make: Any, tmp_path: Path) -> None:
    how = "expected_average_only_in" if make is collected.saelens else True
    path = make(tmp_path, normalize_activations=how)
    with pytest.raises(UserError, match=r"does not record the factor; give input_scale \(--input-scale\)") as error:
        load(path)
    assert "\n" not in str(error.value)
    f, y = relu_sae(0.25 * probe(), double())
    check(path, f / 0.25, y / 0.25, input_scale=0.25)
    f, y = relu_sae(probe(), double())
    check(path, f, y, input_scale=1.0)  # it is folded


def test_a_checkpoint_of_the_training_brings_its_scale(tmp_path: Path) -> None:
    collected.saelens(tmp_path, normalize_activations="expected_average_only_in")
    put(tmp_path / "activation_scaler.json", {"scaling_factor": 0.4, "has_whitening": False})
    f, y = relu_sae(0.4 * probe(), double())
    check(tmp_path, f / 0.4, y / 0.4)
    assert any("times 0.4" in note for note in read(tmp_path).notes)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(scale: float, tmp_path: Path) -> None:
    collected.saelens(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match=r"input_scale|does not record the factor"):
        load(tmp_path, input_scale=scale)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_whitening_is_folded_in(architecture: str, subtract: bool, tmp_path: Path) -> None:
    x, w = probe(), double()
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(D_IN, generator=generator, dtype=torch.float64)
    matrix = torch.eye(D_IN, dtype=torch.float64) + 0.1 * torch.randn(D_IN, D_IN, generator=generator).double()
    inverse = matrix.inverse()
    z = (x - mean) @ matrix
    h = (z - w["b_dec"] * subtract) @ w["W_enc"]
    tensors = {}
    if architecture == "gated":
        tensors = {"b_gate": w["b_enc"].float(), "r_mag": threshold() - 0.4, "b_mag": 0.3 * threshold()}
        r, b = tensors["r_mag"].double(), tensors["b_mag"].double()
        f = (h + w["b_enc"] > 0) * (r.exp() * h + b).relu()
    else:
        f = (h + w["b_enc"]).relu()
    y = (f @ w["W_dec"] + w["b_dec"]) @ inverse + mean
    more = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": subtract, "tensors": tensors}
    collected.saelens(tmp_path, architecture, **more)
    with pytest.raises(UserError, match=r"activation_whitening\.safetensors is not beside it"):
        load(tmp_path)
    white = {"mean": mean, "matrix": matrix, "inverse_matrix": inverse}
    put(tmp_path / "activation_whitening.safetensors", white)
    check(tmp_path, f, y)


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_the_factor_of_fine_tuning_scales_what_is_decoded(name: str, architecture: str, tmp_path: Path) -> None:
    x, w = probe(), double()
    tensors = {name: 0.5 + threshold()}
    h = (x - w["b_dec"]) @ w["W_enc"]
    f = (h + w["b_enc"]).relu()
    if architecture == "gated":
        tensors |= {"b_gate": w["b_enc"].float(), "r_mag": threshold() - 0.4, "b_mag": 0.3 * threshold()}
        f = (h + w["b_enc"] > 0) * (tensors["r_mag"].double().exp() * h + tensors["b_mag"].double()).relu()
    path = collected.saelens_flat(tmp_path, architecture=architecture, finetuning_scaling_factor=True, tensors=tensors)
    check(path, f, (f * tensors[name].double()) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"finetuning_scaling_factor": True}, "which its weights lack"),
        ({"tensors": {"scaling_factor": threshold()}}, "says it is not used"),
        ({"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu' has no counterpart"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations='batch_norm' has no counterpart"),
    ],
)
def test_what_cannot_be_applied_is_refused(more: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = collected.saelens_flat(tmp_path, **more)
    with pytest.raises(UserError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale", "center"])
def test_top_k_with_every_normalisation(how: str, tmp_path: Path) -> None:
    x, w = probe(), double()
    mean = x.mean(1, keepdim=True) if how != "constant_norm_rescale" else torch.zeros_like(x[:, :1])
    scale = torch.ones_like(mean)
    if how == "layer_norm":
        scale = (x - mean).std(1, keepdim=True)
    elif how == "constant_norm_rescale":
        scale = x.norm(dim=1, keepdim=True) / D_IN**0.5
    norms = w["W_dec"].norm(dim=1) * (0.5 + threshold().double())
    tensors = {"W_dec": weights()["W_dec"] * (0.5 + threshold())[:, None]}
    z = (x - mean) / (scale + 1e-5 * (how == "layer_norm"))
    u = ((z - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    top = u.topk(K, dim=1)
    f = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
    y = (f / norms) @ tensors["W_dec"].double() + w["b_dec"]
    more: dict[str, Any] = {"k": K, "rescale_acts_by_decoder_norm": True, "tensors": tensors}
    if how == "center":
        more["metadata"] = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    else:
        more["normalize_activations"] = how
    check(collected.saelens(tmp_path, "topk", **more), f * scale, y * scale + mean)


def test_llama_scope_compares_activation_times_decoder_norm_with_its_threshold(tmp_path: Path) -> None:
    x, w = probe(), double()
    path = collected.llama_scope(tmp_path, "blocks.3.hook_resid_post", "blocks.3.hook_resid_post")
    grown = weights()["W_dec"] * (0.5 + threshold())[:, None]
    put(path / "checkpoints" / "final.safetensors", collected.linear({**weights(), "W_dec": grown}))
    scale = D_IN**0.5 / 10.0
    u = (x * scale) @ w["W_enc"] + w["b_enc"]
    f = u * (u * grown.double().norm(dim=1) > 0.2 * scale)
    check(path, f / scale, (f @ grown.double() + w["b_dec"]) / scale)
    for name, value in {"norm_activation": "token-wise", "act_fn": "topk"}.items():
        with pytest.raises(UserError, match=f"{name}='{value}' has no counterpart"):
            load(collected.llama_scope(tmp_path / name, "a", "a", **{name: value}))


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("how", ["dataset-wise", "token-wise", "inference"])
def test_llamascopium_scales_its_input(act: str, how: str, tmp_path: Path) -> None:
    x, w = probe(), double()
    hook = "blocks.3.hook_resid_post"
    path = collected.llamascopium(tmp_path, hook, hook, 10.0, norm_activation=how, act_fn=act, use_decoder_bias=True)
    levels = {"log_jumprelu_threshold": threshold().log()} if act == "jumprelu" else {}
    norm = {f"dataset_average_activation_norm.{hook}": torch.tensor(10.0)}
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    put(path / "sae_weights.safetensors", {**{names[k]: v for k, v in weights().items()}, **levels, **norm})
    scale = {
        "dataset-wise": torch.tensor(10.0 / D_IN**0.5),
        "token-wise": x.norm(dim=1, keepdim=True) / D_IN**0.5,
        "inference": torch.tensor(1.0),
    }[how]
    u = (x / scale) @ w["W_enc"] + w["b_enc"]
    top = u.topk(K, dim=1)
    f = {
        "relu": u.relu(),
        "topk": torch.zeros_like(u).scatter(1, top.indices, top.values.relu()),
        "jumprelu": u * (u > threshold().double()),
    }[act]
    check(path, f * scale, (f @ w["W_dec"] + w["b_dec"]) * scale)


def test_llamascopium_without_its_scale_is_refused(tmp_path: Path) -> None:
    hook = "blocks.3.hook_resid_post"
    with pytest.raises(UserError, match="does not record the factor; give input_scale"):
        load(collected.llamascopium(tmp_path / "one", hook, hook, None))
    assert load(tmp_path / "one", input_scale=0.5).d_sae == D_SAE
    with pytest.raises(UserError, match="norm_activation='batch-wise' depends on the batch"):
        load(collected.llamascopium(tmp_path / "two", hook, hook, norm_activation="batch-wise"))
    with pytest.raises(UserError, match="gated linear encoder"):
        load(collected.llamascopium(tmp_path / "three", hook, hook, use_glu_encoder=True))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"activation": "Identity"}, "activation 'Identity' has no counterpart"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "TopK followed by 'Identity'"),
    ],
)
def test_openai_with_another_activation_is_refused(more: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        load(collected.openai(tmp_path / "0.pt", **more))


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_it_goes_back_to_saelens_and_nowhere_else(how: str, tmp_path: Path) -> None:
    sae, x = load(collected.saelens(tmp_path / "theirs", "topk", k=K, normalize_activations=how)), probe().float()
    export(sae.train(), tmp_path / "back", "saelens")  # whose mode stays as it was
    assert sae.training
    sae.eval()
    assert json.loads((tmp_path / "back" / "cfg.json").read_text())["normalize_activations"] == how
    again = load(tmp_path / "back")
    assert again.encode(x).indices.equal(sae.encode(x).indices)
    torch.testing.assert_close(again(x), sae(x), **EXACT)
    for to in ("sparsify", "dictionary-learning"):
        with pytest.raises(UserError, match="no linear encoder on raw activations"):
            export(sae, tmp_path / to, to)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {},
    "topk": {"k": K},
    "topk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": K},
    "abstopk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("how", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_as_saelens(name: str, how: str, subtract: bool, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here; run `make test-interop`")
    architecture = name.split()[0]
    more: dict[str, Any] = {
        **ARCHITECTURES[name],
        "tensors": {"W_dec": weights()["W_dec"] * (0.5 + threshold())[:, None]},
    }
    if architecture == "jumprelu":
        more["tensors"]["threshold"] = threshold()
    if architecture == "gated":
        more["tensors"] |= {"b_gate": weights()["b_enc"], "r_mag": threshold() - 0.4, "b_mag": 0.3 * threshold()}
    collected.saelens(tmp_path, architecture, normalize_activations=how, apply_b_dec_to_input=subtract, **more)
    if architecture == "gated":  # SAELens refuses tensors it does not use
        kept = {k: v for k, v in {**weights(), **more["tensors"]}.items() if k != "b_enc"}
        put(tmp_path / "sae_weights.safetensors", kept)
    theirs, ours, x = sae_lens.SAE.load_from_disk(tmp_path), load(tmp_path), probe().float()
    code = ours.encode(x)
    scale = torch.ones(len(x), 1)
    if how == "layer_norm":
        scale = (x - x.mean(1, keepdim=True)).std(1, keepdim=True)
    elif how == "constant_norm_rescale":
        scale = x.norm(dim=1, keepdim=True) / D_IN**0.5
    with torch.no_grad():
        torch.testing.assert_close(code.dense()[:, :D_SAE] / scale, theirs.encode(x), **EXACT)
        torch.testing.assert_close(ours.decode(code), theirs(x), **EXACT)
        export(ours, tmp_path / "back", "saelens")
        again = sae_lens.SAE.load_from_disk(tmp_path / "back")
        torch.testing.assert_close(again.encode(x), theirs.encode(x), **EXACT)
        torch.testing.assert_close(again(x), theirs(x), **EXACT)

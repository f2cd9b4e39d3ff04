"""Public collections, laid out as they are downloaded: the right numbers, hook point, model and preparation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from saelab import Run, inspect, load
from saelab.cli import main
from saelab.cli.opening import results_folder
from saelab.errors import UserError
from saelab.interop import FORMATS, collections
from saelab.interop.collections import COLLECTIONS, on_hub
from saelab.interop.fetch import full_name, resolve
from tests.interop import collected
from tests.interop.collected import D_IN, D_SAE, K, cached, put, threshold, weights

# float32 against float64: values of order 10, sums of 16 products.
EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
Formula = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]]


def jump(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gemma Scope: u = x W_enc + b_enc, f = u where u exceeds its threshold."""
    u = x @ w["W_enc"] + w["b_enc"]
    f = u * (u > threshold().double())
    return f, f @ w["W_dec"] + w["b_dec"]


def embedded(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same on embeddings before Gemma multiplies them by sqrt(d_model)."""
    f, y = jump(x / D_IN**0.5, w)
    return f * D_IN**0.5, y * D_IN**0.5


def llama(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Llama Scope: inputs of mean norm 10 are scaled to sqrt(d); one threshold in raw units."""
    s = D_IN**0.5 / 10.0
    u = (s * x) @ w["W_enc"] + w["b_enc"]
    f = u * (u > 0.2 * s)
    return f / s, (f @ w["W_dec"] + w["b_dec"]) / s


def top_k(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    u = x @ w["W_enc"] + w["b_enc"]
    top = u.topk(K, dim=1)
    f = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
    return f, f @ w["W_dec"] + w["b_dec"]


def top_k_subtracting(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return top_k(x, {**w, "b_enc": w["b_enc"] - w["b_dec"] @ w["W_enc"]})


def openai(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    mean = x.mean(1, keepdim=True)
    std = (x - mean).std(1, keepdim=True)
    f, y = top_k_subtracting((x - mean) / (std + 1e-5), w)
    return f * std, y * std + mean


def plain_relu(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    f = (x @ w["W_enc"] + w["b_enc"]).relu()
    return f, f @ w["W_dec"] + w["b_dec"]


def subtracting_relu(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return plain_relu(x, {**w, "b_enc": w["b_enc"] - w["b_dec"] @ w["W_enc"]})


def centred(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    mean = x.mean(1, keepdim=True)
    f, y = subtracting_relu(x - mean, w)
    return f, y + mean


def centred_and_scaled(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factor of block 1 of the GPT-2 MLP collection."""
    mean, s = x.mean(1, keepdim=True), 2.369398401
    f, y = subtracting_relu(s * (x - mean), w)
    return f / s, y / s + mean


def one_norm(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scale = x.norm(dim=1, keepdim=True) / D_IN**0.5
    f, y = subtracting_relu(x / scale, w)
    return f * scale, y * scale


class Case(NamedTuple):
    make: Callable[[Path], Path]
    repository: str
    inside: str
    formula: Formula
    hook: str
    model: str | None
    context: int | None = None


def gemma_1(kind: str, inside: str, hook: str, model: str = "2b-pt", formula: Formula = jump) -> Case:
    name = {"2b-pt": "google/gemma-2-2b", "9b-it": "google/gemma-2-9b-it", "27b-pt": "google/gemma-2-27b"}[model]
    return Case(collected.gemma_scope, f"google/gemma-scope-{model}-{kind}", inside, formula, hook, name, 1024)


def gemma_2(inside: str, hf_hook: str, hook: str, model: str = "1b-pt") -> Case:
    make = lambda folder: collected.gemma_scope_2(folder, hf_hook, model_name=f"google/gemma-3-{model}")  # noqa: E731
    name = "google/gemma-3-270m" if model == "270m-pt" else f"google/gemma-3-{model}"
    return Case(make, f"google/gemma-scope-2-{model}", inside, jump, hook, name, 1024)


def bare_gemma_2(folder: Path) -> Path:
    """Some folders of version 2 have no configuration."""
    collected.gemma_scope_2(folder, "model.layers.5.output")
    (folder / "config.json").unlink()
    return folder


def llama_scope(place: str, hook: str) -> Case:
    repository = f"fnlp/Llama3_1-8B-Base-LX{place}-8x"
    make = lambda folder: collected.llama_scope(folder, hook, hook)  # noqa: E731
    return Case(make, repository, f"Llama3_1-8B-Base-L9{place}-8x", llama, hook, "meta-llama/Llama-3.1-8B", 1024)


def openai_case(place: str, hook: str) -> Case:
    path = f"{place}_v5_32k/autoencoders/4.pt"
    return Case(collected.openai, "gpt2-small", path, openai, hook, "openai-community/gpt2", 64)


def saelens_of_gpt2(folder: Path) -> Path:
    return collected.saelens_flat(folder, hook_name="blocks.8.hook_resid_pre")


def saelens_of_gpt2_mlp(folder: Path) -> Path:
    return collected.saelens_flat(folder, hook_name="blocks.1.hook_mlp_out", normalize_activations=True)


def mistral(folder: Path) -> Path:
    return collected.saelens_flat(folder, hook_name="blocks.8.hook_resid_pre", model_name="mistral-7b")


def sparsify_with_its_run(folder: Path) -> Path:
    put(folder.parent / "config.json", {"model": "EleutherAI/pythia-160m", "ctx_len": 2048, "dataset": "pile"})
    return collected.sparsify(folder)


def r1_distill(folder: Path) -> Path:
    hook = "blocks.3.hook_resid_post"
    path = collected.llamascopium(folder, hook, hook, None, norm_activation="inference")
    names = {"encoder.weight": "encoder.weight"}
    put(path / "sae_weights.safetensors", {names.get(k, k): v for k, v in collected.linear(weights()).items()})
    return path


DICTIONARY_LEARNING = (("resid_post", "hook_resid_post"), ("mlp_out", "hook_mlp_out"), ("attn_out", "hook_attn_out"))
CASES = {
    "gemma scope residual": gemma_1("res", "layer_12/width_16k/average_l0_82", "blocks.12.hook_resid_post"),
    "gemma scope tuned": gemma_1("res", "layer_9/width_16k/average_l0_88", "blocks.9.hook_resid_post", "9b-it"),
    "gemma scope 27b": gemma_1("res", "layer_10/width_131k/average_l0_106", "blocks.10.hook_resid_post", "27b-pt"),
    "gemma scope mlp": gemma_1("mlp", "layer_12/width_16k/average_l0_60", "blocks.12.hook_mlp_out"),
    "gemma scope attention": gemma_1("att", "layer_12/width_16k/average_l0_60", "blocks.12.attn.hook_z"),
    "gemma scope embedding": gemma_1("res", "embedding/width_4k/average_l0_6", "hook_embed", formula=embedded),
    "gemma scope 2 residual": gemma_2(
        "resid_post/layer_13_width_16k_l0_big", "model.layers.13.output", "blocks.13.hook_resid_post"
    ),
    "gemma scope 2 residual 270m": gemma_2(
        "resid_post_all/layer_0_width_16k_l0_big", "model.layers.0.output", "blocks.0.hook_resid_post", "270m-pt"
    ),
    "gemma scope 2 mlp": gemma_2(
        "mlp_out_all/layer_3_width_16k_l0_small",
        "model.layers.3.post_feedforward_layernorm.output",
        "blocks.3.hook_mlp_out",
        "4b-it",
    ),
    "gemma scope 2 attention": gemma_2(
        "attn_out/layer_7_width_65k_l0_medium",
        "model.layers.7.self_attn.o_proj.input",
        "blocks.7.attn.hook_z",
        "12b-pt",
    ),
    "gemma scope 2 without configuration": Case(
        bare_gemma_2,
        "google/gemma-scope-2-1b-pt",
        "mlp_out/layer_5_width_16k_l0_big",
        jump,
        "blocks.5.hook_mlp_out",
        "google/gemma-3-1b-pt",
        1024,
    ),
    "llama scope residual": llama_scope("R", "blocks.9.hook_resid_post"),
    "llama scope mlp": llama_scope("M", "blocks.9.hook_mlp_out"),
    "llama scope attention": llama_scope("A", "blocks.9.hook_attn_out"),
    "llama scope r1": Case(
        r1_distill,
        "fnlp/Llama-Scope-R1-Distill",
        "800M-Slimpajama-0-OpenR1-Math-220k/L3R",
        top_k,
        "blocks.3.hook_resid_post",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        1024,
    ),
    "qwen scope": Case(
        lambda path: collected.qwen_scope(path.parent, 7),
        f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}",
        "layer7.sae.pt",
        top_k,
        "blocks.7.hook_resid_post",
        "Qwen/Qwen3-1.7B-Base",
    ),
    "goodfire": Case(
        collected.goodfire,
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        plain_relu,
        "blocks.19.hook_resid_post",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    "openai residual": openai_case("resid_post_mlp", "blocks.4.hook_resid_post"),
    "openai middle": openai_case("resid_post_attn", "blocks.4.hook_resid_mid"),
    "openai mlp": openai_case("resid_delta_mlp", "blocks.4.hook_mlp_out"),
    "openai attention": openai_case("resid_delta_attn", "blocks.4.hook_attn_out"),
    "gpt-2 residual": Case(
        saelens_of_gpt2,
        "jbloom/GPT2-Small-SAEs-Reformatted",
        "blocks.8.hook_resid_pre",
        centred,
        "blocks.8.hook_resid_pre",
        "openai-community/gpt2",
    ),
    "gpt-2 mlp": Case(
        saelens_of_gpt2_mlp,
        "tommmcgrath/gpt2-small-mlp-out-saes",
        "sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0",
        centred_and_scaled,
        "blocks.1.hook_mlp_out",
        "openai-community/gpt2",
    ),
    "mistral": Case(
        mistral,
        "JoshEngels/Mistral-7B-Residual-Stream-SAEs",
        "mistral_7b_layer_8",
        one_norm,
        "blocks.8.hook_resid_pre",
        "mistralai/Mistral-7B-v0.1",
    ),
    "kissane": Case(
        collected.nanda,
        "ckkissane/attn-saes-gpt2-small-all-layers",
        "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt",
        subtracting_relu,
        "blocks.5.attn.hook_z",
        "openai-community/gpt2",
        128,
    ),
    "qresearch": Case(
        collected.qresearch,
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        plain_relu,
        "blocks.19.hook_resid_post",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        1024,
    ),
    "sparsify": Case(
        collected.sparsify,
        "EleutherAI/sae-llama-3-8b-32x",
        "layers.10",
        top_k_subtracting,
        "layers.10",
        "meta-llama/Meta-Llama-3-8B",
    ),
    "sparsify with its run": Case(
        sparsify_with_its_run,
        "me/own",
        "layers.4.mlp",
        top_k_subtracting,
        "layers.4.mlp",
        "EleutherAI/pythia-160m",
        2048,
    ),
    **{
        f"dictionary_learning {place}": Case(
            lambda folder, place=place: collected.dictionary_learning(folder, submodule_name=f"{place}_layer_3"),
            "canrager/lm_sae",
            f"sweep/{place}_layer_3/trainer_0",
            subtracting_relu,
            f"blocks.3.{hook}",
            "tiny",
            128,
        )
        for place, hook in DICTIONARY_LEARNING
    },
}


SPLIT = {
    "gemma scope 2 mlp": "params.safetensors",
    "llama scope residual": "checkpoints/final.safetensors",
    "llama scope r1": "sae_weights.safetensors",
    "gpt-2 residual": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
}
CONVERTED = ["gemma scope mlp", "gemma scope embedding", "gemma scope 2 mlp", "llama scope mlp", "qwen scope"]
GEMMA = ["gemma scope tuned", "gemma scope mlp", "gemma scope attention", "gemma scope embedding"]


def made(case: Case, root: Path, in_cache: bool) -> Path:
    """The case's files below ``root``, as a plain download or in the hub's cache; returns what is to be loaded."""
    repository = cached(root, case.repository) if in_cache else root / case.repository.rpartition("/")[2]
    path = case.make(repository / case.inside)
    if in_cache:
        collected.into_blobs(repository, repository)
    return path


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_numbers_hook_and_model(name: str, in_cache: bool, tmp_path: Path) -> None:
    case = CASES[name]
    if in_cache and "/" not in case.repository:
        pytest.skip("not on the hub")
    path = made(case, tmp_path, in_cache)
    run, x = Run.open(path), 2 * torch.randn(100, D_IN, generator=torch.Generator().manual_seed(3)).double()
    codes, recon = case.formula(x, {key: value.double() for key, value in weights().items()})
    code = run.sae.encode(x.float())
    torch.testing.assert_close(code.dense()[:, :D_SAE], codes.float(), **EXACT)
    torch.testing.assert_close(run.sae.decode(code), recon.float(), **EXACT)
    assert (run.hook_name, run.model_name) == (case.hook, case.model)
    assert run.recorded.get("context_size") == case.context


@pytest.mark.parametrize("name", SPLIT)
def test_weights_in_several_files(name: str, tmp_path: Path) -> None:
    case, (place, _, file) = CASES[name], SPLIT[name].rpartition("/")
    whole, path = made(case, tmp_path / "whole", False), made(case, tmp_path / "parts", False)
    folder = collected.split(path / place, file)
    x = torch.randn(50, D_IN)
    torch.testing.assert_close(load(path)(x), load(whole)(x), rtol=0, atol=0)
    assert [run.path for run in Run.scan(tmp_path / "parts").values()] == [path]
    copied = results_folder(Run(path=path, origin="hf://a/b/c"), tmp_path / "copy")
    torch.testing.assert_close(load(copied)(x), load(whole)(x), rtol=0, atol=0)
    index = folder / f"{file}.index.json"
    part = next(iter(folder.glob("*-00002-of-00002.safetensors")))
    part.rename(part.with_suffix(".kept"))
    with pytest.raises(UserError, match="is missing, which holds a part of"):
        load(path)
    part.with_suffix(".kept").rename(part)
    content = json.loads(index.read_text())
    collected.put(index, {"weight_map": {**content["weight_map"], "more": part.name}})
    with pytest.raises(UserError, match="promises 'more', which no file holds"):
        load(path)
    for wrong in ({"weight_map": {"W_dec": "../../else.safetensors"}}, {"weight_map": [1]}, {"weight_map": {"a": 3}}):
        collected.put(index, wrong)
        with pytest.raises(UserError, match=r"index\.json"):
            load(path)


@pytest.mark.parametrize(
    "name", ["gemma scope mlp", "gemma scope 2 attention", "llama scope residual", "openai middle"]
)
def test_inspect_says_what_it_found_and_how_it_knows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    path = made(case, tmp_path, False)
    facts = inspect(path)
    assert (facts["hook"], facts["model"]) == (case.hook, case.model)
    assert facts["collection"] and facts["trained_on"]["context_size"] == case.context
    by_table = "the table of collections"
    assert (by_table in facts["known_from"]["hook_name"]) is (name in {"gemma scope mlp", "openai middle"})
    assert main(["inspect", str(path)]) in {0, None}
    said = capsys.readouterr().out
    assert case.hook in said and "hook_name from" in said and facts["collection"] in said


@pytest.mark.parametrize("to", ["saelab", "saelens"])
@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_sae_keeps_them(name: str, to: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = Run.open(made(case, tmp_path, False))
    main(["convert", str(source.path), str(tmp_path / "out"), "--to", to])
    again = Run.open(tmp_path / "out")
    assert (again.hook_name, again.model_name) == (case.hook, case.model)
    assert again.recorded.get("context_size") == case.context
    assert again.recorded.get("prepend_bos") == source.recorded.get("prepend_bos")
    assert again.notes[: len(source.notes)] == source.notes
    assert again.recorded["converted"]["format"] == source.format
    x = torch.randn(50, D_IN)
    torch.testing.assert_close(again.sae(x), source.sae(x), **EXACT)


def test_a_converted_sae_is_not_normalised_twice(tmp_path: Path) -> None:
    source = Run.open(made(CASES["gpt-2 mlp"], tmp_path, False))
    main(
        [
            "convert",
            str(source.path),
            str(tmp_path / "gpt2-small-mlp-out-saes" / "blocks.1.hook_mlp_out"),
            "--to",
            "saelab",
        ]
    )
    again = Run.open(tmp_path / "gpt2-small-mlp-out-saes" / "blocks.1.hook_mlp_out")
    x = torch.randn(50, D_IN)
    torch.testing.assert_close(again.sae(x), source.sae(x), **EXACT)
    assert again.notes == source.notes and again.notes


def test_a_place_that_nothing_records_is_not_guessed(tmp_path: Path) -> None:
    folder = collected.gemma_scope(tmp_path / "layer_20" / "width_16k" / "average_l0_71")
    facts = inspect(folder)
    assert facts["hook"] is None and "the hook point is not recorded" in facts["notes"]


def test_a_configuration_that_contradicts_the_table_is_a_note(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2-1b-pt" / "mlp_out" / "layer_3_width_16k_l0_big"
    run = Run.open(collected.gemma_scope_2(folder, "model.layers.3.output"))
    assert run.hook_name == "blocks.3.hook_resid_post"
    assert any("its files say it reads blocks.3.hook_resid_post" in note for note in run.notes)


NAMES = {
    "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82": (
        "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    ),
    "gemma-scope-2-4b-pt-res/layer_17_width_16k_l0_big": (
        "google/gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_big"
    ),
    "gemma-scope-2-270m-it-att-all/layer_0_width_16k_l0_big": (
        "google/gemma-scope-2-270m-it/attn_out_all/layer_0_width_16k_l0_big"
    ),
    "gemma-scope-2-1b-pt-transcoders/transcoder/layer_13_width_16k_l0_big": (
        "google/gemma-scope-2-1b-pt/transcoder/layer_13_width_16k_l0_big"
    ),
    "gpt2-small-res-jb/blocks.8.hook_resid_pre": "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre",
    "gpt2-small-mlp-out-v5-32k/blocks.3.hook_mlp_out": "jbloom/GPT2-Small-OAI-v5-32k-mlp-out-SAEs/v5_32k_layer_3",
    "llama_scope_lxr_8x/l9r_8x": "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L9R-8x",
    "goodfire-llama-3.1-8b-instruct/layer_19": (
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19/Llama-3.1-8B-Instruct-SAE-l19.pth"
    ),
    "mistral-7b-res-wg/blocks.8.hook_resid_pre": "JoshEngels/Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_8",
    "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical": (
        "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    ),
    "gemma-scope-9b-pt-res/layer_20/width_524k/canonical": (
        "google/gemma-scope-9b-pt-res/layer_20/width_524k/average_l0_48"
    ),
    "gemma-scope-9b-it-res-canonical/layer_31/width_131k/canonical": (
        "google/gemma-scope-9b-it-res/layer_31/width_131k/average_l0_109"
    ),
    "gpt2-small-hook-z-kk/blocks.5.hook_z": "ckkissane/attn-saes-gpt2-small-all-layers/"
    "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt",
    "gpt2-small-mlp-tm/blocks.11.hook_mlp_out": (
        "tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_blocks.11.hook_mlp_out_24576:v2"
    ),
    "qwen-scope-3.5-35b-a3b-base-w128k-l100/layer3": ("Qwen/SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_100/layer3.sae.pt"),
    "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.5.hook_resid_post__trainer_5_step_97": (
        "canrager/saebench_gemma-2-2b_width-2pow12_date-1109/gemma-2-2b_topk_width-2pow12_date-1109/"
        "resid_post_layer_5_checkpoints/trainer_5_step_97"
    ),
    "SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer3.sae.pt": "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer3.sae.pt",
}


@pytest.mark.parametrize("name", NAMES)
def test_an_sae_is_found_by_the_name_of_its_collection(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("saelab.interop.fetch.download", lambda hub_id, revision=None: asked.append(hub_id) or tmp_path)
    assert on_hub(name) == NAMES[name] and full_name(name) == f"hf://{NAMES[name]}"
    resolve(name)
    assert asked == [NAMES[name]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma-scope-2b-pt-res/layer_99/width_16k/canonical", "it has layers 0, 1, 2"),
        ("gemma-scope-2b-pt-res-canonical/layer_3/width_7k/canonical", "it has width_16k, width_1m"),
        ("gemma-scope-27b-pt-mlp/layer_3/width_16k/canonical", "it has no such names"),
        ("mwhanna-qwen3-4b-transcoders/layer_0", "holds transcoders, not SAEs"),
        ("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "holds temporal SAEs, not SAEs"),
    ],
)
def test_names_of_what_is_not_there_are_refused_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_names_are_local_first_and_unknown_ones_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = "layer_12/width_16k/average_l0_82"
    collected.gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / inside)
    assert load("gemma-scope-2b-pt-res", inside).d_sae == D_SAE
    assert load(Path("gemma-scope-2b-pt-res"), inside).d_sae == D_SAE
    assert on_hub("someone/gemma") is None and on_hub("gemma-scope-2b-pt-res") is None


@pytest.mark.filterwarnings("ignore")
def test_names_are_those_of_saelens() -> None:
    pytest.importorskip("sae_lens", reason="SAELens is not installed here; run `make test-interop`")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    wrong, checked = [], 0
    for release, entry in get_pretrained_saes_directory().items():
        for sae_id, path in entry.saes_map.items():
            try:
                place = on_hub(f"{release}/{sae_id}")
            except UserError as error:
                assert "not SAEs" in str(error)
                continue
            checked += 1
            if place != f"{entry.repo_id}/{path}":
                wrong.append((release, sae_id, place))
    assert not wrong[:5] and checked > 13000, checked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GEMMA)
def test_hooks_are_those_of_saelens(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason="SAELens is not installed here; run `make test-interop`")
    from sae_lens.loading.pretrained_sae_loaders import get_gemma_2_config_from_hf

    case = CASES[name]
    theirs = get_gemma_2_config_from_hf(case.repository, case.inside, "cpu")
    assert theirs["hook_name"] == case.hook
    assert f"google/{theirs['model_name']}" == case.model and theirs["context_size"] == case.context


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-2-2b-it", "google/gemma-2-2b-it"),
        ("gemma-2b", "google/gemma-2b"),
        ("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("my-model", "my-model"),
    ],
)
def test_models_are_called_as_on_the_hub(name: str, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collections.model_on_hub(name) == hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert collections.model_on_hub(name) == name


def test_every_entry_names_a_format_that_is_read() -> None:
    assert {entry.format for entry in COLLECTIONS} <= FORMATS.keys()


def test_heads_whose_value_biases_may_have_been_moved_have_a_note(tmp_path: Path) -> None:
    name = "gpt2-small_L5_Hcat_z_lr1.20e-03.pt"
    assert any("fold_value_biases" in note for note in Run.open(collected.nanda(tmp_path / name)).notes)
    other = collected.nanda(tmp_path / "mlp" / name, act_name="blocks.5.hook_mlp_out")
    assert not any("fold_value_biases" in note for note in Run.open(other).notes)

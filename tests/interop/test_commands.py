"""Commands on SAEs of other tools: notes, provenance, copies, and numbers against plain Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab import ActivationCache, Run
from saelab.cli import main
from saelab.lm import load_hf_model, load_model, locate
from tests.interop import collected
from tests.interop.collected import D_IN, D_SAE, put, threshold, weights
from tests.tiny_lm import save_gemma3, save_gpt2, save_llama, sentences, tokenizer

HOOK = "blocks.1.hook_resid_pre"
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 and its activations."""
    root = tmp_path_factory.mktemp("gpt2")
    save_gpt2(root / "model")
    (root / "text.txt").write_text(sentences(1500))
    options = ["--context-length", "32", "--held-out", "0.5"]
    text = ["--model", str(root / "model"), "--text", str(root / "text.txt")]
    main(["harvest", *text, "--hook", HOOK, "--out", str(root / "cache"), *options])
    return root


def centred(root: Path, gpt2: Path) -> Path:
    """An SAE as SAELens trains it on GPT-2 with centred writing weights."""
    metadata = {**CENTRED, "model_name": str(gpt2 / "model"), "context_size": 16, "prepend_bos": True}
    return collected.saelens(root / "sae", hook=HOOK, metadata=metadata)


def cache(folder: Path) -> None:
    """300 random activations."""
    ActivationCache.from_tensors(folder, torch.randn(300, D_IN), torch.randint(0, 9, (300,)), context_length=20)


def status(args: list[str]) -> int:
    """The exit status of a command."""
    try:
        main(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


COMMANDS = {
    "evaluate": (["evaluate", "SAE", "--cache", "CACHE", "--lm-tokens", "0"], 0),
    "index": (["index", "SAE", "--cache", "CACHE", "--model", "none"], 0),
    "steer": (
        ["steer", "SAE", "--latent", "3", "--strength", "4", "--prompt", "the river", "--max-new-tokens", "2"],
        0,
    ),
    "convert": (["convert", "SAE", "OUT", "--to", "saelab"], 0),
    "inspect": (["inspect", "SAE"], 0),
    "train": (["train", "CACHE", "--from", "SAE", "--out", "OUT", "--batch-size", "64"], 0),
    "labels": (["labels", "SAE", "LABELS"], 0),
    "explain": (["explain", "SAE", "--endpoint", "http://127.0.0.1:9/v1", "--model", "none", "--count", "1"], 0),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_notes_reach_every_command(name: str, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = centred(tmp_path, gpt2)
    (tmp_path / "labels.jsonl").write_text(json.dumps({"index": 1, "description": "x"}))
    places = {"SAE": sae, "CACHE": gpt2 / "cache", "OUT": tmp_path / "out", "LABELS": tmp_path / "labels.jsonl"}
    if name == "explain":
        main(["index", str(sae), "--cache", str(gpt2 / "cache"), "--model", "none"])
        capsys.readouterr()
    args, wanted = COMMANDS[name]
    assert status([str(places.get(arg, arg)) for arg in args]) == wanted
    said = capsys.readouterr()
    assert "note: trained on a model with center_writing_weights" in said.err + said.out
    if name in {"evaluate", "index"}:
        assert "note: the SAE was trained on contexts of 16 tokens, the cache has 32" in said.err


def test_a_converted_sae_still_says_it(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(centred(tmp_path, gpt2)), str(tmp_path / "run"), "--to", "saelab"])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--cache", str(gpt2 / "cache"), "--lm-tokens", "0"])
    assert "note: trained on a model with center_writing_weights" in capsys.readouterr().err


def test_evaluate_measures_a_centred_sae_as_the_formula_says(gpt2: Path, tmp_path: Path) -> None:
    sae = centred(tmp_path, gpt2)
    main(["evaluate", str(sae), "--cache", str(gpt2 / "cache"), "--lm-tokens", "0"])
    found = json.loads((sae / "evaluation.json").read_text())["metrics"]
    data = ActivationCache(gpt2 / "cache")
    x = torch.cat([batch.acts for batch in data.head(10**6)]).double()[data.manifest.held_out_from :]
    w = {name: value.double() for name, value in weights().items()}
    mean = x.mean(1, keepdim=True)
    f = ((x - mean - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    error = x - (f @ w["W_dec"] + w["b_dec"] + mean)
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    assert found["dead_fraction"]["n"] == D_SAE
    assert found["fvu"]["value"] == pytest.approx(fvu.item(), rel=1e-4)
    assert found["l0"]["value"] == pytest.approx((f > 0).sum(1).double().mean().item(), rel=1e-4)


@pytest.mark.parametrize("command", ["evaluate", "index"])
def test_a_copy_keeps_what_the_names_said(command: str, tmp_path: Path) -> None:
    place = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_1" / "width_16k" / "average_l0_9"
    sae = collected.gemma_scope(place)
    ActivationCache.from_tensors(
        tmp_path / "cache", torch.randn(300, D_IN), torch.randint(0, 9, (300,)), context_length=20
    )
    more = ["--lm-tokens", "0"] if command == "evaluate" else ["--model", "none"]
    main([command, str(sae), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "copy"), *more])
    copy = Run.open(tmp_path / "copy")
    assert (copy.hook_name, copy.model_name) == ("blocks.1.hook_mlp_out", "google/gemma-2-2b")
    assert copy.has_index is (command == "index")


def test_a_single_file_is_converted_where_results_need_a_folder(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = collected.openai(tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "1.pt")
    ActivationCache.from_tensors(
        tmp_path / "cache", torch.randn(300, D_IN), torch.randint(0, 9, (300,)), context_length=20
    )
    args = ["index", str(file), "--cache", str(tmp_path / "cache"), "--model", "none"]
    assert status(args) == 2
    assert "is a file, and results need a folder: name a new one with --out" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "run")]
    assert status([*args, *out]) == 0
    run = Run.open(tmp_path / "run")
    assert run.has_index and run.hook_name == "blocks.1.hook_resid_post" and run.notes
    x = torch.randn(40, D_IN)
    torch.testing.assert_close(run.sae(x), Run.open(file).sae(x))
    assert status(["evaluate", str(file), "--cache", str(tmp_path / "cache"), "--lm-tokens", "0", *out]) == 0  # again
    other = collected.goodfire(tmp_path / "other.pth")
    assert status(["index", str(other), "--cache", str(tmp_path / "cache"), "--model", "none", *out]) == 2
    assert "exists and is not the SAE of" in capsys.readouterr().err


def gemma2(folder: Path) -> Path:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": D_IN, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    attention = {"head_dim": 4, "num_key_value_heads": 2, "sliding_window": 32, "query_pre_attn_scalar": 4}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=320, **ends, **sizes, **attention))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if "norm" in name else parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer("<s>").save_pretrained(folder)
    return folder


# Collection's place -> the module of a block whose output (or input) the collection's authors mean.
PLACES = {
    "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_9": ("", "out"),
    "gemma-scope-2b-pt-mlp/layer_1/width_16k/average_l0_9": ("post_feedforward_layernorm", "out"),
    "gemma-scope-2b-pt-att/layer_1/width_16k/average_l0_9": ("self_attn.o_proj", "in"),
    "gemma-scope-2-1b-pt/resid_post/layer_1_width_16k_l0_big": ("", "out"),
    "gemma-scope-2-1b-pt/mlp_out/layer_1_width_16k_l0_big": ("post_feedforward_layernorm", "out"),
    "gemma-scope-2-1b-pt/attn_out/layer_1_width_16k_l0_big": ("self_attn.o_proj", "in"),
    "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": ("embed", "out"),
}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_gemma_scope_sae_reads_the_place_its_authors_mean(place: str, plain: bool, tmp_path: Path) -> None:
    if plain and "embedding" in place:
        pytest.skip("only a bridge has hook_embed")
    second = "gemma-scope-2-" in place
    model = (load_hf_model if plain else load_model)(str((save_gemma3 if second else gemma2)(tmp_path / "model")))
    path = tmp_path / place
    if second:
        collected.gemma_scope_2(path, "model.layers.1.output")
        (path / "config.json").unlink()
    else:
        collected.gemma_scope(path)
    run, seen, truth = Run.open(path), [], []
    reference = load_hf_model(str(tmp_path / "model"))
    module, side = PLACES[place]
    target: nn.Module = reference.model.embed_tokens if module == "embed" else reference.model.layers[1]
    if module not in {"", "embed"}:
        target = target.get_submodule(module)

    def keep(_module: nn.Module, args: Any, output: Any = None) -> None:
        value = args[0] if side == "in" else output
        truth.append((value[0] if isinstance(value, tuple) else value).detach())

    target.register_forward_pre_hook(keep) if side == "in" else target.register_forward_hook(keep)
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))

    def read(x: Tensor) -> None:
        seen.append(x.detach())

    with locate(model, run.hook_name).register(model, read), torch.no_grad():
        reference(ids)
        model(ids)
    torch.testing.assert_close(seen[0].flatten(0, 1), truth[0].flatten(0, 1), rtol=1e-4, atol=1e-5)
    if module == "embed":  # what the SAE was trained on: rows of the matrix
        rows = reference.model.embed_tokens.weight[ids].flatten(0, 1).double()
        w = {name: value.double() for name, value in weights().items()}
        u = rows @ w["W_enc"] + w["b_enc"]
        f = u * (u > threshold().double())
        expected = (f @ w["W_dec"] + w["b_dec"]) * D_IN**0.5
        torch.testing.assert_close(run.sae(seen[0].flatten(0, 1)).double(), expected, rtol=1e-3, atol=1e-3)


def test_another_model_is_a_note_and_the_wrong_place_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_9"
    sae = collected.gemma_scope(place)
    save_llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(sentences(300))
    about = ["--model", str(tmp_path / "llama"), "--text", str(tmp_path / "text.txt"), "--context-length", "32"]
    for hook, wanted in (("blocks.1.hook_resid_post", 0), ("blocks.2.hook_resid_post", 2)):
        main(["harvest", *about, "--hook", hook, "--out", str(tmp_path / hook)])
        capsys.readouterr()
        assert status(["index", str(sae), "--cache", str(tmp_path / hook), "--model", "none"]) == wanted
        said = capsys.readouterr().err
        assert ("the SAE was trained on google/gemma-2-2b, the cache holds" in said) is (wanted == 0)
        assert ("was trained on hook_name=blocks.1.hook_resid_post" in said) is (wanted == 2)


def test_weights_in_sixteen_bits(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        folder = collected.saelens(tmp_path / str(dtype))
        put(folder / "sae_weights.safetensors", {name: value.to(dtype) for name, value in weights().items()})
        run = Run.open(folder)
        assert run.sae.W_dec.dtype == torch.float32 and run.sae.d_sae == D_SAE
        assert torch.equal(run.sae.W_dec, weights()["W_dec"].to(dtype).float())

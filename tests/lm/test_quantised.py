"""Quantised models: torch's int8 through harvest, evaluation and steering; what is not installed is refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.harvesting import HarvestConfig, harvest
from saelab.lm import load_model
from saelab.sae import build
from saelab.sae.weights import save as save_sae
from saelab.steering import Add, Recipe, SteeringVector, generate
from tests import tiny_lm
from tests.zoo import families

HOOK, FAMILIES = "blocks.1.hook_resid_post", ("llama", "pythia", "opt", "gemma2")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def int8(folder: Path) -> Any:
    """The plain model with every linear map in int8, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    quantised.tokenizer = AutoTokenizer.from_pretrained(folder)
    return quantised


@pytest.mark.parametrize("name", FAMILIES)
def test_an_int8_model_is_harvested_evaluated_and_steered_as_itself(name: str, tmp_path: Path) -> None:
    model = int8(families.save(name, tmp_path / "model"))
    (tmp_path / "text.txt").write_text(tiny_lm.sentences(100))
    config = HarvestConfig(tokens=300, context_length=12, held_out=0.3, dtype="float32", pass_tokens=12)
    cache = harvest(model, HOOK, tmp_path / "text.txt", tmp_path / "cache", config)
    family, seen = families.FAMILIES[name], []
    block = model.get_submodule(f"{family.blocks}.1")
    for tokens, rows in list(cache.contexts("held_out"))[:3]:
        with torch.no_grad(), block.register_forward_hook(lambda _, __, out: seen.append(out)):
            model(input_ids=tokens[None], use_cache=False)
        expected = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
        torch.testing.assert_close(cache.read(rows[rows >= 0]).acts, expected[0][rows >= 0], rtol=1e-5, atol=1e-5)
    sae = build("topk", cache.d_in, 48, k=4).eval()
    assert evaluate(sae, cache, model, EvaluateConfig(lm_tokens=30)).metrics["ce_loss_with_sae"].value > 0
    with pytest.raises(UserError, match=r"other weights|another model"):
        evaluate(sae, cache, load_model(tmp_path / "model", device="cpu"), EvaluateConfig(lm_tokens=30))
    add = Add(SteeringVector.from_tensor(torch.randn(cache.d_in), HOOK), 5.0)
    steered = generate(model, "the cat sat", add, max_new_tokens=5)
    recipe = Recipe.of(model, add)
    with recipe.attach(model):
        assert generate(model, "the cat sat", max_new_tokens=5) == steered
    with pytest.raises(UserError, match="other weights"), recipe.attach(load_model(tmp_path / "model", device="cpu")):
        pass


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("optimum", {"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ("gptqmodel", {"quant_method": "awq", "bits": 4}),
        ("torchao", {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
        ("hqq", {"quant_method": "hqq", "bits": 4}),
        ("", "nonsense"),
    ],
)
def test_a_library_that_is_not_installed_is_named(
    package: str, settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    folder = tiny_lm.save_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_sae(build("topk", 32, 48, k=4), tmp_path / "run", {"hook_name": HOOK, "model_name": str(folder)})
    (tmp_path / "t.txt").write_text("the cat sat on a mat. " * 20)
    harvesting = ["harvest", "--model", str(folder), "--hook", HOOK, "--text", str(tmp_path / "t.txt")]
    steering = ["steer", str(tmp_path / "run"), "--latent", "1", "--strength", "1raw", "--prompt", "a"]
    for command in ([*harvesting, "--out", str(tmp_path / "c")], steering):
        with pytest.raises(SystemExit):
            main(command)
        said = " ".join(capsys.readouterr().err.split())
        assert "cannot load model" in said and package in said.lower() and "Traceback" not in said
    assert not (tmp_path / "c").exists()


def test_a_torchao_folder_is_harvested_as_it_computes(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    folder = families.save("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    model.save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "int8")
    (tmp_path / "t.txt").write_text(tiny_lm.sentences(100))
    options = ["--text", str(tmp_path / "t.txt"), "--tokens", "200", "--context-length", "16", "--dtype", "float32"]
    options += ["--hook", HOOK, "--device", "cpu"]
    main(["harvest", "--model", str(tmp_path / "int8"), "--out", str(tmp_path / "c"), *options])
    cache = ActivationCache(tmp_path / "c")
    tokens, rows = next(iter(cache.contexts("train")))
    with torch.no_grad():
        expected = model(tokens[None], output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(cache.read(rows[rows >= 0]).acts, expected[rows >= 0], rtol=1e-5, atol=1e-5)
    save_sae(build("topk", cache.d_in, 48, k=4), tmp_path / "run", {"hook_name": HOOK})
    main(["evaluate", str(tmp_path / "run"), "--cache", str(tmp_path / "c"), "--device", "cpu", "--lm-tokens", "50"])
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run"), "--cache", str(tmp_path / "c"), "--model", str(folder)])

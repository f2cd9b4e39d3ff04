"""The size of a forward pass, and the precision of the model, on devices of several sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config

from saelab.cli.sources import running_dtype
from saelab.harvesting import HarvestConfig
from saelab.harvesting.config import LARGEST_PASS, PASS, largest_pass

FAMILIES = [LlamaConfig, GPT2Config, Qwen2Config, Gemma3TextConfig]


class Model(nn.Module):
    def __init__(self, config: Any, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(1000, dtype=dtype))
        self.place = torch.device(device)

    def parameters(self, recurse: bool = True) -> Any:
        size = self.weight.element_size()
        yield SimpleNamespace(device=self.place, numel=self.weight.numel, element_size=lambda: size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_grows_with_the_memory_between_its_bounds(family: Any, gradients: bool) -> None:
    model = Model(family())
    sizes = [largest_pass(model, free, gradients) for free in (0, 1e9, 4e9, 16e9, 64e9, 1e15)]
    assert sizes == sorted(sizes) and sizes[0] == PASS and sizes[-1] == LARGEST_PASS
    assert largest_pass(model, 8e9, True) <= largest_pass(model, 8e9, False)
    token = 16 * model.config.hidden_size * 2
    assert all(tokens * token <= free for tokens, free in zip(sizes[2:], (4e9, 16e9, 64e9)) if tokens > PASS)


def test_a_model_of_several_kinds_is_measured_by_its_text() -> None:
    inner = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    outer = SimpleNamespace(get_text_config=lambda: inner)
    assert largest_pass(Model(outer), 1e8, True) == largest_pass(Model(inner), 1e8, True) == LARGEST_PASS


def test_only_a_gpu_gets_larger_passes_and_only_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30)
    assert HarvestConfig().sized(Model(config)).pass_tokens == PASS
    assert HarvestConfig().sized(Model(config, device="mps")).pass_tokens == PASS
    assert HarvestConfig().sized(Model(config, device="cuda:0")).pass_tokens == LARGEST_PASS
    assert HarvestConfig(pass_tokens=512).sized(Model(config, device="cuda:0")).pass_tokens == 512
    assert HarvestConfig(context_length=100).pass_contexts == PASS // 100


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_auto_is_the_checkpoints_precision_on_a_gpu_only(asked: str) -> None:
    for device in ("cpu", "mps", "cuda:1"):
        expected = asked if asked != "auto" else "auto" if device == "cuda:1" else "float32"
        assert running_dtype(asked, torch.device(device)) == expected

"""The plain model behind a bridge, for architectures that have no fused attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from saelab.lm import load_model, weights_fingerprint
from saelab.lm.unwrapped import plain_model
from tests import tiny_lm

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
MODELS: dict[str, tuple[Any, Any]] = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, **HEADS)),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig(**SIZES, **HEADS, num_local_experts=2, num_experts_per_tok=1)),
    "gpt-j": (
        GPTJForCausalLM,
        GPTJConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    ),
    "mamba": (MambaForCausalLM, MambaConfig(**SIZES, state_size=8)),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_without_fused_attention_has_a_plain_model(family: str, tmp_path: Path) -> None:
    cls, config = MODELS[family]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, None
    original = cls(config).eval()
    original.save_pretrained(tmp_path)
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    bridge, ids = load_model(str(tmp_path), device="cpu"), torch.tensor([[0, 50, 7, 200]])
    plain = plain_model(bridge)
    assert plain is not None
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, original(input_ids=ids).logits)
    assert weights_fingerprint(bridge) == weights_fingerprint(original)

"""What sublayers add to the residual stream, in blocks of unusual build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AfmoeConfig, AfmoeForCausalLM, RwkvConfig, RwkvForCausalLM

from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.lm import locate
from tests.zoo.families import Family, _sizes

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_dense_layers": 1}
SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
MODELS = {
    "norms behind a mixture with shared experts": Family(
        AfmoeForCausalLM.__name__, AfmoeConfig.__name__, _sizes(head_dim=8, **EXPERTS)
    ),
    "no heads": Family(
        RwkvForCausalLM.__name__, RwkvConfig.__name__, SIZES | {"context_length": 64, "attention_hidden_size": 32}
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_the_sum_of_what_the_sublayers_add(name: str) -> None:
    model: Any = MODELS[name].build()
    ids = torch.randint(9, 300, (2, 10))

    def read(point: str) -> torch.Tensor:
        return Reader(model, [locate(model, f"blocks.1.{point}")]).activations(ids)[0]

    mid = read("hook_resid_mid")
    torch.testing.assert_close(read("hook_resid_pre") + read("hook_attn_out"), mid, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mid + read("hook_mlp_out"), read("hook_resid_post"), rtol=1e-5, atol=1e-5)


def test_queries_of_a_model_without_heads_are_refused() -> None:
    model = MODELS["no heads"].build()
    with pytest.raises(UserError, match="hook_q"):
        locate(model, "blocks.1.attn.hook_q")

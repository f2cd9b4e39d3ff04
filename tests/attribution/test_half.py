"""Gradients of a model in float16 are those of the same weights in float32, however small or large they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.attribution import attribute
from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.lm import locate
from saelab.lm.gradients import gradient_of
from saelab.lm.structure import blocks
from saelab.runs import Run
from tests import tiny_lm
from tests.attribution import tiny
from tests.zoo.families import FAMILIES

# What is added to the residual stream, and the unembedding: after a large stream gradients are small.
WRITES = ("o_proj.weight", "down_proj.weight", "dense.weight", "dense_4h_to_h.weight", "c_proj.weight")
SIZES = {"small": (1000.0, 0.01), "large": (0.01, 1000.0)}
HOOK = "blocks.1.hook_resid_post"
NAMES = ["llama", "pythia", "gpt2", "qwen3", "starcoder2"]


def models(name: str, size: str) -> tuple[Any, Any]:
    """A model in float16, and the same weights in float32."""
    half, (stream, head) = FAMILIES[name].build(), SIZES[size]
    half.get_output_embeddings().weight = torch.nn.Parameter(half.get_output_embeddings().weight.detach() * head)
    with torch.no_grad():
        for path, parameter in half.named_parameters():
            if path.endswith(WRITES) or any(part in path for part in ("embed_tokens", "embed_in", "wte", "wpe")):
                parameter.mul_(stream)
    half = half.half()
    whole = copy.deepcopy(half).float()
    half.tokenizer = whole.tokenizer = tiny_lm.tokenizer()
    return half, whole


def plain_gradient(model: Any, ids: Tensor, of: Any) -> Tensor:
    """The gradient of ``of(logits)`` behind block 1 by a hook of torch."""
    seen: list[Tensor] = []

    def hook(_m: Any, _a: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        seen[0].retain_grad()

    handle = blocks(model)[1][1].register_forward_hook(hook)
    of(model(input_ids=ids, use_cache=False).logits.float()).backward()
    handle.remove()
    assert seen[0].grad is not None
    return seen[0].grad[0]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert ((found == 0) == (expected == 0)).all(), "no entry is lost"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_effects_are_those_in_float32(name: str, size: str) -> None:
    half, whole = models(name, size)
    sae = tiny.sae("relu", dtype=torch.float32)
    with torch.no_grad():
        sae.W_enc.div_(SIZES[size][0])
    found, expected = (attribute(Run(sae, HOOK), tiny.PROMPT, 40, model=m, keep=1.0, check=0) for m in (half, whole))
    theirs = {node.id: node.effect for node in expected.nodes}
    ours = {node.id: node.effect for node in found.nodes if node.id in theirs}
    assert len(ours) > 0.8 * len(theirs) > 10  # the strongest may differ
    size_ = max(map(abs, theirs.values()))
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 0.03 * size_


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_in_float32(name: str, size: str) -> None:
    half, whole = models(name, size)
    ids = torch.tensor([[0, 30, 31, 44, 50, 61, 72, 83]])

    def loss(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")

    (grads,) = Reader(half, [locate(half, HOOK)]).gradients(ids)[1]
    close(grads[0], plain_gradient(whole, ids, loss))


def test_a_gradient_that_is_finite_at_no_scale_is_refused() -> None:
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    assert gradient_of(x.float() * 1e-9, x).tolist() == pytest.approx([1e-9] * 3, rel=0.02)
    assert gradient_of(x.float() * 1e4, x).tolist() == pytest.approx([1e4] * 3)
    with pytest.raises(UserError, match="not finite in float16; load it in bfloat16"):
        gradient_of(x.float() * float("inf"), x)

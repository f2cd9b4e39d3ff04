"""The frozen model: effects that add up, an oracle that computes it by hand, and families that cannot be frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.attribution import attribute
from saelab.errors import UserError
from tests.attribution import tiny

EVERYTHING = {"keep": 1.0, "max_nodes": 10_000, "mode": "frozen", "check": 0}
# Norms before, after and on both sides of sublayers; parallel sublayers; fused, grouped and rotary attention; ALiBi;
# capped logits; experts; multipliers.
FAMILIES = [
    "gpt2",
    "llama",
    "pythia",
    "gemma2",
    "olmo2",
    "bloom",
    "falcon-7b",
    "granite",
    "mixtral",
    "persimmon",
    "gpt-oss",
]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n in tiny.FAMILIES])
def test_effects_add_up_in_every_family(name: str) -> None:
    runs = tiny.runs(0, 1, variant="abs_topk", dtype=torch.float32)
    graph = attribute(runs, tiny.PROMPT, model=tiny.model(name, torch.float32), **EVERYTHING)
    parts = [node.direct for node in graph.nodes if node.kind != "target"]
    added = sum(parts) + graph.sums["offsets"] + graph.sums["biases"]
    assert graph.mode == "frozen" and abs(graph.sums["gap"]) < 1e-4
    assert added == pytest.approx(graph.value, abs=1e-4)
    assert graph.drift < 1e-4 and sum(map(abs, parts)) > 0.1


@pytest.mark.minutes
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_is_explained_or_refused(name: str) -> None:
    """As it is always; frozen exactly, or with the reason why not."""
    model = tiny.model(name, torch.float32)
    runs = tiny.runs(0, 1, variant="abs_topk", dtype=torch.float32, d_in=model.config.get_text_config().hidden_size)
    assert attribute(runs, tiny.PROMPT, model=model, check=1).latents
    try:
        graph = attribute(runs, tiny.PROMPT, model=model, mode="frozen", check=0)
    except UserError as error:
        assert "--mode gradient" in str(error)
    else:
        assert abs(graph.sums["gap"]) < 1e-4
    tiny.model.cache_clear()


class Linear:
    """GPT-2 with its attention patterns and the scales of its norms held, written out; MLPs are given."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.h = model, model.transformer.h
        eager = model.config._attn_implementation
        model.set_attn_implementation("eager")
        seen: dict[str, Tensor] = {}
        norms = {name: m for name, m in model.named_modules() if type(m).__name__ == "LayerNorm"}
        hooks = [
            m.register_forward_pre_hook(lambda _, a, name=name: seen.__setitem__(name, a[0]))
            for name, m in norms.items()
        ]
        hooks += [
            b.mlp.register_forward_hook(lambda _, a, y, i=i: seen.__setitem__(f"mlp{i}", y))
            for i, b in enumerate(self.h)
        ]
        self.patterns = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(eager)
        self.scale = {
            name: (x - x.mean(-1, keepdim=True)).var(-1, unbiased=False, keepdim=True).add(norms[name].eps).rsqrt()
            for name, x in seen.items()
            if name in norms
        }
        self.mlps = [seen[f"mlp{i}"] for i in range(len(self.h))]
        self.start = seen["transformer.h.0.ln_1"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        m = self.model.get_submodule(name)
        return (x - x.mean(-1, keepdim=True)) * self.scale[name] * m.weight + m.bias

    def logits(self, x: Tensor, mlps: list[Tensor], places: dict[int, Tensor]) -> Tensor:
        """From the embedding ``x``; ``places`` replace the residual stream after a block."""
        heads = self.model.config.n_head
        for i, block in enumerate(self.h):
            values = block.attn.c_attn(self.norm(f"transformer.h.{i}.ln_1", x)).chunk(3, dim=-1)[2]
            values = values.unflatten(-1, (heads, -1)).transpose(1, 2)
            mixed = (self.patterns[i] @ values).transpose(1, 2).flatten(2)
            x = x + block.attn.c_proj(mixed) + mlps[i]
            x = places.get(i, x)
        return self.model.lm_head(self.norm("transformer.ln_f", x))[:, -1]


@torch.no_grad()
def test_every_direct_effect_is_that_of_the_linear_model_written_out() -> None:
    model, (run,) = tiny.model("gpt2"), tiny.runs(1, variant="abs_topk")
    graph = attribute(run, tiny.PROMPT, model=model, **EVERYTHING)
    ids = torch.tensor([graph.token_ids])
    linear = Linear(model, ids)
    y = model.transformer.h[1].register_forward_hook(lambda _, a, o: kept.append(o if isinstance(o, Tensor) else o[0]))
    kept: list[Tensor] = []
    model(input_ids=ids, use_cache=False)
    y.remove()
    stream = kept[0]

    def value(x: Tensor, mlps: list[Tensor], place: Tensor) -> float:
        logits = linear.logits(x, mlps, {1: place})[0]
        return float(logits[graph.target_token] - logits.mean())

    whole = value(linear.start, linear.mlps, stream)
    assert whole == pytest.approx(graph.value, abs=1e-9)
    compared = 0
    for node in graph.nodes:
        x, mlps, place = linear.start.clone(), [m.clone() for m in linear.mlps], stream.clone()
        p = node.position
        if node.kind == "latent":
            place[0, p] -= node.activation * run.sae.W_dec[node.latent]
        elif node.kind == "error":
            place[0, p] = 0 if p == 0 else run.sae(place[0, p][None])[0]
        elif node.kind == "mlp":
            mlps[node.layer][0, p] = 0
        elif node.kind == "embedding":
            x[0, p] = 0
        else:
            continue
        assert node.direct == pytest.approx(whole - value(x, mlps, place), abs=1e-8), node
        compared += 1
    assert compared > 40
    none = value(linear.start * 0, [m * 0 for m in linear.mlps], torch.cat([stream[:, :1] * 0, stream[:, 1:] * 0], 1))
    assert graph.sums["biases"] == pytest.approx(none, abs=1e-8)


UNFREEZABLE = {
    "deepseek-v3": "latent attention",
    "mamba": "no attention",
    "gemma4": "nonlinearity beside",
    "jamba": "no attention",
}


@pytest.mark.parametrize("name", [n for n in UNFREEZABLE if n in tiny.FAMILIES])
def test_a_family_that_cannot_be_frozen_says_so_in_one_line(name: str) -> None:
    runs = tiny.runs(0, dtype=torch.float32)
    with pytest.raises(UserError, match=f"{UNFREEZABLE[name]}.*--mode gradient") as caught:
        attribute(runs, tiny.PROMPT, model=tiny.model(name, torch.float32), mode="frozen")
    assert "\n" not in str(caught.value)


def test_what_is_not_linear_is_refused() -> None:
    """A gate on the attention's output stays, and the sum of effects shows it."""
    model, runs = tiny.model("llama"), tiny.runs(1)
    attention = model.model.layers[2].self_attn
    handle = attention.register_forward_hook(lambda _m, _a, output: (torch.tanh(output[0]), *output[1:]))
    try:
        with pytest.raises(UserError, match="is not linear with attention and norms frozen"):
            attribute(runs, tiny.PROMPT, model=model, mode="frozen")
    finally:
        handle.remove()
    with pytest.raises(UserError, match="log-probability is not linear"):
        attribute(runs, tiny.PROMPT, model=model, mode="frozen", of="logprob")
    with pytest.raises(UserError, match="a frozen model is linear"):
        attribute(runs, tiny.PROMPT, model=model, mode="frozen", integrated=4)


class TanhNorm(torch.nn.Module):
    """Squashes each number: no norm, whatever it is called."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_what_is_only_called_a_norm_is_refused_in_two_bytes_too() -> None:
    runs, model = tiny.runs(0, dtype=torch.float32), tiny.FAMILIES["llama"].build().bfloat16()
    model.tokenizer = tiny.tiny_lm.tokenizer()
    attribute(runs, tiny.PROMPT, model=model, **EVERYTHING)
    model.model.layers[1].input_layernorm = TanhNorm()
    with pytest.raises(UserError, match=r"layers\.1\.input_layernorm \(TanhNorm\) is no norm that can be frozen"):
        attribute(runs, tiny.PROMPT, model=model, **EVERYTHING)

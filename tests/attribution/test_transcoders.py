"""Transcoders at the MLPs: a model in which everything is linear, and single ones in a model as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.attribution import attribute, building
from saelab.errors import UserError
from saelab.runs import Run
from saelab.sae import VARIANTS, build
from tests.attribution import tiny
from tests.attribution.test_oracle import EVERYTHING, STEP, edited, prediction
from tests.zoo.families import WIDTH


def transcoders(*blocks: int, variant: str = "topk", dtype: torch.dtype = torch.float64, **options: Any) -> list[Run]:
    """Random ones from the input of each block's MLP, as its norm gives it, to what the MLP adds."""
    found = []
    for block in blocks:
        torch.manual_seed(block)
        settings = tiny.SIZES.get(variant, {"k": 5}) | options
        sae = build(variant, d_in=WIDTH, d_sae=tiny.LATENTS, d_out=WIDTH, **settings)
        with torch.no_grad():
            for name in ("b_dec", "b_enc", "b_gate", "b_mag", "W_skip"):
                if isinstance(getattr(sae, name, None), Tensor):
                    getattr(sae, name).normal_(std=0.1)
        sae.calibrate([2.0 * torch.randn(200, WIDTH)])
        read, write = f"blocks.{block}.mlp.hook_in", f"blocks.{block}.hook_mlp_out"
        found.append(Run(sae.eval().to(dtype), read, hook_name_out=write))
    return found


CAN = [name for name in VARIANTS if name != "matching_pursuit"]


@pytest.mark.parametrize("variant", CAN)
def test_effects_add_up_to_the_logit(variant: str) -> None:
    runs = transcoders(0, 1, 2, variant=variant, skip=True)
    graph = attribute(runs, tiny.PROMPT, model=tiny.model("gpt2"), check=0, **EVERYTHING)
    assert graph.mode == "frozen", "transcoders replace every MLP"
    parts = [node.direct for node in graph.nodes if node.kind != "target"]
    assert {node.kind for node in graph.nodes} == {"latent", "error", "embedding", "target"}
    assert sum(parts) + graph.sums["offsets"] + graph.sums["biases"] == pytest.approx(graph.value, abs=1e-9)
    assert abs(graph.sums["gap"]) < 1e-9 and graph.drift < 1e-9


@pytest.mark.parametrize("name", ["llama", "pythia", "gemma2", "olmo2"])
def test_effects_add_up_in_other_families(name: str) -> None:
    runs = transcoders(0, 1, 2, variant="abs_topk", dtype=torch.float32)
    graph = attribute(runs, tiny.PROMPT, model=tiny.model(name, torch.float32), check=0)
    assert graph.mode == "frozen" and abs(graph.sums["gap"]) < 1e-3 and graph.drift < 1e-4


@pytest.mark.parametrize("skip", [False, True])
def test_the_whole_effect_is_the_direct_one_and_that_of_what_a_latent_feeds(
    skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "EDGES", 1.0)
    runs = transcoders(0, 1, 2, variant="abs_topk", skip=skip)
    graph = attribute(runs, tiny.PROMPT, model=tiny.model("gpt2"), check=0, **EVERYTHING)
    compared = 0
    for node in graph.nodes:
        if node.kind != "target":
            carried = sum(edge.effect for edge in graph.out_of(node.id))
            assert carried == pytest.approx(node.effect, abs=1e-9)
            compared += node.kind == "latent" and abs(node.effect - node.direct) > 1e-3
    assert compared > 10


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_one_transcoder_in_the_model_as_it_is(skip: bool) -> None:
    """The derivative by brute force: the latent's part of the MLP's output is scaled, all later layers react."""
    model, (run,) = tiny.model("gpt2"), transcoders(1, variant="abs_topk", skip=skip)
    graph = attribute(run, tiny.PROMPT, model=model, check=5, **EVERYTHING)
    assert graph.mode == "gradient"
    seen: list[Tensor] = []
    with edited(model.transformer.h[1].ln_2, seen.append), edited(model.transformer.h[1].mlp, seen.append):
        prediction(model, graph)
    x, y = (t[0].clone() for t in seen)
    nodes = [node for node in graph.nodes if node.kind in ("latent", "error")]

    def moved(sign: float) -> Any:
        def edit(out: Tensor) -> Tensor:
            new = out.clone()
            for row, node in enumerate(nodes):
                p = node.position
                if node.kind == "latent":
                    change = node.activation * run.sae.W_dec[node.latent]
                else:
                    change = y[p] if p == 0 else y[p] - run.sae(x[p][None])[0]
                new[row, p] += sign * STEP * change
            return new

        return edit

    ends = []
    for sign in (1.0, -1.0):
        with edited(model.transformer.h[1].mlp, moved(sign)):
            ends.append(prediction(model, graph, len(nodes)))
    slopes = (ends[0] - ends[1]) / (2 * STEP)
    found = torch.tensor([node.effect for node in nodes], dtype=torch.float64)
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-7)


def test_a_target_before_its_input_is_refused() -> None:
    (run,) = transcoders(1)
    backwards = Run(run.sae, "blocks.1.hook_mlp_out", hook_name_out="blocks.0.hook_mlp_out")
    with pytest.raises(UserError, match="comes before"):
        attribute(backwards, tiny.PROMPT, model=tiny.model("gpt2"))

"""Effects and edges against brute force in double precision: every node perturbed by plain hooks on the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.attribution import AttributionGraph, attribute
from saelab.sae import VARIANTS
from tests.attribution import tiny

EVERYTHING = {"keep": 1.0, "max_nodes": 10_000}
STEP = 1e-5


@contextlib.contextmanager
def edited(block: Any, edit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    def hook(_m: Any, _a: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        new = edit(y)
        return None if new is None else ((new, *output[1:]) if isinstance(output, tuple) else new)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def prediction(model: Any, graph: AttributionGraph, rows: int = 1) -> Tensor:
    logits = model(input_ids=torch.tensor([graph.token_ids] * rows), use_cache=False).logits[:, -1]
    return logits[:, graph.target_token] - logits.mean(dim=-1)


def moved(graph: AttributionGraph, nodes: list[Any], sae: Any, sign: float) -> Callable[[Tensor], Tensor]:
    """Row ``i`` has the activation of node ``i`` multiplied by ``1 + sign * STEP``."""

    def edit(y: Tensor) -> Tensor:
        new = y.clone()
        for row, node in enumerate(nodes):
            if node.kind == "latent":
                change = node.activation * sae.W_dec[node.latent]
            elif node.position == 0:
                change = y[row, 0]
            else:
                change = y[row, node.position] - sae(y[row, node.position][None])[0]
            new[row, node.position] += sign * STEP * change
        return new

    return edit


@torch.no_grad()
@pytest.mark.parametrize("variant", [*VARIANTS])
def test_every_effect_is_the_derivative(variant: str) -> None:
    """In the untouched model, of every latent and every error term, whatever the SAE."""
    model, (run,) = tiny.model("gpt2"), tiny.runs(1, variant=variant)
    graph = attribute(run, tiny.PROMPT, model=model, check=0, **EVERYTHING)
    nodes = [node for node in graph.nodes if node.kind in ("latent", "error")]
    assert len(graph.latents) > 5 and len(nodes) - len(graph.latents) == len(graph.tokens)
    ends = []
    for sign in (1.0, -1.0):
        with edited(model.transformer.h[1], moved(graph, nodes, run.sae, sign)):
            ends.append(prediction(model, graph, len(nodes)))
    slopes = (ends[0] - ends[1]) / (2 * STEP)
    found = torch.tensor([node.effect for node in nodes], dtype=torch.float64)
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(graph.value, float(prediction(model, graph)))


@torch.no_grad()
def test_every_edge_is_the_derivative_of_what_it_leads_to() -> None:
    """Between two residual streams: the change of the later latent, whose place in the code stays the same."""
    model, (first, second) = tiny.model("gpt2"), tiny.runs(0, 1, variant="abs_topk")
    graph = attribute([first, second], tiny.PROMPT, model=model, check=0, **EVERYTHING)
    sources = [node for node in graph.nodes if node.layer == 0 and node.kind in ("latent", "error")]
    seen: list[Tensor] = []
    for sign in (1.0, -1.0):
        with (
            edited(model.transformer.h[0], moved(graph, sources, first.sae, sign)),
            edited(model.transformer.h[1], lambda y: seen.append(y.clone())),  # type: ignore[func-returns-value]
        ):
            prediction(model, graph, len(sources))
    change = (seen[0] - seen[1]) / (2 * STEP)
    rows, compared = {node.id: i for i, node in enumerate(sources)}, 0
    for edge in graph.edges:
        goal = None if edge.target == "prediction" else graph[edge.target]
        if edge.source in rows and goal is not None and goal.kind == "latent":
            slope = change[rows[edge.source], goal.position] @ second.sae.W_enc[:, goal.latent]
            assert edge.weight == pytest.approx(float(slope), rel=1e-5, abs=1e-8)
            assert edge.effect == pytest.approx(edge.weight * goal.effect / goal.activation, rel=1e-9)
            compared += 1
    assert compared > 100


def test_what_a_node_does_is_what_its_edges_carry() -> None:
    """A residual stream lets nothing pass by: the effect of an earlier node is the sum over the later ones."""
    model, chosen = tiny.model("llama"), tiny.runs(0, 2, variant="abs_topk")
    graph = attribute(chosen, tiny.PROMPT, model=model, check=0, **EVERYTHING)
    large = max(abs(node.effect) for node in graph.nodes)
    for node in graph.nodes:
        if node.layer == 0 and node.kind in ("latent", "error"):
            carried = sum(edge.effect for edge in graph.out_of(node.id))
            # Edges that carry the last two per cent are left out.
            assert carried == pytest.approx(node.effect, abs=0.05 * large)
            assert node.direct == 0


def test_integrated_gradients_add_up_to_the_change_along_the_path() -> None:
    model, (run,) = tiny.model("gpt2"), tiny.runs(1)
    gaps = []
    for steps in (4, 64):
        graph = attribute(run, tiny.PROMPT, model=model, check=0, integrated=steps, **EVERYTHING)
        (place,) = graph.places
        gaps.append(abs(place.gap))
    with (
        torch.no_grad(),
        edited(model.transformer.h[1], lambda y: torch.cat([y[:, :1], y[:, 1:] * 0 + run.sae.b_dec], 1)),
    ):
        none = float(prediction(model, graph))
    errors = sum(n.effect for n in graph.nodes if n.kind == "error" and n.position > 0)
    change = place.latents_effect + errors
    assert change == pytest.approx(graph.value - none, abs=1e-2 * abs(graph.value - none))
    assert gaps[1] < gaps[0] / 4


@torch.no_grad()
def test_ablation_is_what_plain_hooks_show() -> None:
    model, (run,) = tiny.model("gpt2"), tiny.runs(1)
    graph = attribute(run, tiny.PROMPT, model=model, check=10)
    assert graph.checks is not None and len(graph.checks.nodes) == min(10, len(graph.latents)) > 2
    for found in graph.checks.nodes:
        node = graph[found.id]

        def remove(y: Tensor, node: Any = node) -> Tensor:
            y = y.clone()
            y[0, node.position] -= node.activation * run.sae.W_dec[node.latent]
            return y

        with edited(model.transformer.h[1], remove):
            assert found.ablated == pytest.approx(graph.value - float(prediction(model, graph)), abs=1e-9)


@torch.no_grad()
def test_faithfulness_is_what_plain_hooks_show() -> None:
    model, (first, second) = tiny.model("gpt2"), tiny.runs(0, 1)
    graph = attribute([first, second], tiny.PROMPT, model=model, check=0, keep=0.5)
    assert graph.faithfulness is not None
    kept = {(n.layer, n.position, n.latent) for n in graph.latents}

    def circuit(layer: int, sae: Any, keep: Callable[[tuple[int, int, int]], bool]) -> Callable[[Tensor], Tensor]:
        def edit(y: Tensor) -> Tensor:
            y, code = y.clone(), sae.encode(y[0, 1:])
            for row, latent, value in zip(code.rows().tolist(), code.indices.tolist(), code.values.tolist()):
                if not keep((layer, row + 1, latent)):
                    y[0, row + 1] -= value * sae.W_dec[latent]
            return y

        return edit

    def run_with(keep: Callable[[tuple[int, int, int]], bool]) -> float:
        h = model.transformer.h
        with edited(h[0], circuit(0, first.sae, keep)), edited(h[1], circuit(1, second.sae, keep)):
            return float(prediction(model, graph))

    found = graph.faithfulness
    assert found.whole == pytest.approx(graph.value)
    assert found.kept == pytest.approx(run_with(lambda key: key in kept))
    assert found.others == pytest.approx(run_with(lambda key: key not in kept))
    assert found.none == pytest.approx(run_with(lambda key: False))

"""Attribution held against ablation: the strongest latents one by one, and the kept graph as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from saelab.attribution.findings import Ablated, Check, Faithfulness
from saelab.attribution.graph import AttributionGraph, Node
from saelab.attribution.passes import Passes, batches
from saelab.attribution.places import Place
from saelab.attribution.target import Target
from saelab.lm.route import Edit

ROWS = 10  # ablations that share a pass


@torch.no_grad()
def check(graph: AttributionGraph, passes: Passes, target: Target, count: int) -> Check:
    """Ablate the ``count`` strongest latents of the graph, each alone."""
    nodes = graph.latents[:count]
    found: list[Ablated] = []
    for part in batches(len(nodes), ROWS):
        chosen = [nodes[i] for i in part]
        with ExitStack() as stack:
            for place in passes.places:
                stack.enter_context(place.route.register(passes.model, _removing(place, chosen)))
            values = target.value(passes.logits(len(chosen) + 1)).tolist()
        found += [Ablated(n.id, n.effect, values[-1] - value) for n, value in zip(chosen, values)]
    return Check(found)


def _removing(place: Place, nodes: Sequence[Node]) -> Edit:
    own = [(row, node) for row, node in enumerate(nodes) if node.layer == place.layer]

    def edit(_x: Tensor, y: Tensor) -> Tensor | None:
        if not own:
            return None
        new = y.clone()
        for row, node in own:
            assert node.latent is not None and node.activation is not None
            change = node.activation * place.sae.W_dec[node.latent]
            new[row, node.position] -= change.to(new)
        return new

    return edit


def _error(place: Place, x: Tensor, y: Tensor) -> Tensor:
    """The error terms ``[n, d_out]`` of activations ``x`` read and ``y`` explained."""
    rows = x.to(place.sae.W_dec)
    explained = place.sae.reconstruct(rows, place.sae.encode(rows))
    return y.to(explained) - explained


@torch.no_grad()
def faithfulness(graph: AttributionGraph, passes: Passes, target: Target) -> Faithfulness:
    """Run the graph as a circuit: everything that it leaves out is ablated, at all places at once."""
    # Whole, kept, others, none; then with the error terms of the graph alone: kept, none.
    rows = [("all", True), ("kept", True), ("others", True), ("none", True), ("kept", False), ("none", False)]
    with ExitStack() as stack:
        for place in passes.places:
            stack.enter_context(place.route.register(passes.model, _circuit(place, graph, passes.text.skip, rows)))
        values = target.value(passes.logits(len(rows))).tolist()
    return Faithfulness(*values)


def _circuit(place: Place, graph: AttributionGraph, skip: int, rows: Sequence[tuple[str, bool]]) -> Edit:
    own = [node for node in graph.nodes if node.layer == place.layer]
    sae = place.sae
    latents = torch.tensor(
        [(n.position - skip) * sae.d_sae + n.latent for n in own if n.kind == "latent" and n.latent is not None],
        dtype=torch.int64,
    )
    errors = [n.position for n in own if n.kind == "error"]

    def edit(x: Tensor, y: Tensor) -> Tensor:
        new = y.clone()
        for row, (which, with_errors) in enumerate(rows):
            encoded = x[row, skip:].to(sae.W_dec)
            code = sae.encode(encoded)
            kept = torch.isin(code.rows() * sae.d_sae + code.indices, latents.to(code.device))
            drop = {"all": kept & ~kept, "kept": ~kept, "others": kept, "none": kept | ~kept}[which]
            drop &= code.indices < sae.n_features
            change = encoded.new_zeros(encoded.shape[0], sae.W_dec.shape[1])
            values = code.values[drop, None] * sae.W_dec[code.indices[drop]]
            change.index_add_(0, code.rows()[drop], values)
            if not with_errors:
                lost = _error(place, x[row, skip:], y[row, skip:])
                lost[[p - skip for p in errors if which == "kept" and p >= skip]] = 0.0
                change += lost
            new[row, skip:] -= change.to(new)
        return new

    return edit

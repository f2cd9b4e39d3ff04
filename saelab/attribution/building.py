"""Which nodes a graph keeps, and the edges between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.attribution.edges import Causes, Goal, trace
from saelab.attribution.effects import Effects, PlaceEffects
from saelab.attribution.graph import Edge, Node, PlaceSummary, node_id
from saelab.attribution.passes import Pass, Passes, Text
from saelab.attribution.target import Target
from saelab.runs import Run

PREDICTION = "prediction"
EDGES = 0.98  # share of the summed magnitudes of edges that is kept
LABEL = 60  # letters


@dataclass
class Chosen:
    """The kept nodes, strongest first, the prediction last."""

    nodes: list[Node]
    summaries: list[PlaceSummary]


def choose(effects: Effects, text: Text, keep: float, most: int) -> Chosen:
    """Per place the fewest latents and error terms that have the share ``keep`` of the summed magnitudes of effects.

    At most ``most`` over all places, in equal parts; where that is less than one each, the strongest of the first of
    each. Every embedding is kept, and of MLPs that no transcoder replaces those that a place of their own would keep.
    """
    sizes = [torch.cat([place.total, place.error]) for place in effects.places]
    blocks = list(effects.mlps)
    total, direct = (
        torch.stack([d[b] for b in blocks]).flatten() if blocks else torch.empty(0)
        for d in (effects.mlps_total, effects.mlps)
    )
    kept = _shares([*sizes, total], keep, most)
    nodes: list[Node] = []
    summaries: list[PlaceSummary] = []
    for place, own in zip(effects.places, ([_node(p, i) for i in k] for p, k in zip(effects.places, kept))):
        nodes += own
        summaries.append(_summary(place, own))
    for i in kept[-1]:
        layer, position = blocks[i // text.length], i % text.length
        nodes.append(Node(f"{layer}_mlp_{position}", "mlp", layer, position, float(total[i]), float(direct[i])))
    pairs = zip(effects.embedding.tolist(), effects.embedding_direct.tolist())
    nodes += [Node(f"E_{p}", "embedding", -1, p, total, direct) for p, (total, direct) in enumerate(pairs)]
    nodes.sort(key=lambda node: -abs(node.effect))
    value = effects.value
    nodes.append(Node(PREDICTION, "target", 1 + max(p.layer for p in summaries), text.length - 1, value, value))
    return Chosen(nodes, summaries)


def _shares(effects: Sequence[Tensor], keep: float, most: int) -> list[list[int]]:
    """Of each place's effects the indices that are kept, strongest first; at most ``most`` in all."""
    places = sum(one.numel() > 0 for one in effects)
    kept = [_strongest(one, keep, max(1, most // max(places, 1))) for one in effects]
    order = sorted((i for i, own in enumerate(kept) if own), key=lambda i: -abs(float(effects[i][kept[i][0]])))
    lost = set(order[most:]) if places > most else set()
    return [[] if i in lost else own for i, own in enumerate(kept)]


def _strongest(effects: Tensor, keep: float, most: int) -> list[int]:
    sizes, order = effects.abs().double().sort(descending=True)
    reached = sizes.cumsum(0)
    count = int((reached < keep * reached[-1]).sum()) + 1 if len(sizes) and reached[-1] > 0 else 0
    return order[: min(count, most)].tolist()


def _node(place: PlaceEffects, i: int) -> Node:
    layer, n = place.place.layer, len(place.total)
    if i >= n:
        position = i - n
        effect, direct = float(place.error[position]), float(place.error_direct[position])
        label = "left whole" if position < place.skip else "error term"
        return Node(f"{layer}_error_{position}", "error", layer, position, effect, direct, label=label)
    latent, position = int(place.code.indices[i]), int(place.positions[i])
    activation = float(place.code.values[i])
    return Node(
        node_id(layer, latent, position),
        "latent",
        layer,
        position,
        float(place.total[i]),
        float(place.direct[i]),
        latent,
        activation,
        describe(place.place.run, latent, -1 if activation < 0 else 1),
    )


def describe(run: Run, latent: int, pole: int) -> str:
    """What the index says of a latent: its label, else the tokens it fires on; nothing without an index."""
    index = run.index
    if index is None or latent >= index.d_sae:
        return ""
    row = index.latent(latent, pole if pole in index.poles else 1)
    text = row.get("label") or " ".join(str(token) for token in (row.get("top_tokens") or [])[:4])
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"


def _summary(place: PlaceEffects, kept: Sequence[Node]) -> PlaceSummary:
    size = float(place.total.abs().double().sum() + place.error.abs().double().sum())
    of_kept = sum(abs(node.effect) for node in kept)
    run = place.place.run
    return PlaceSummary(
        name=place.place.name,
        layer=place.place.layer,
        run=str(run.path) if run.path is not None else run.name,
        read=place.place.route.read.hook_name,
        latents=len(place.total),
        kept=len(kept),
        latents_effect=float(place.total.double().sum()),
        errors_effect=float(place.error.double().sum()),
        rest_effect=place.rest,
        share=place.share,
        kept_share=min(1.0, of_kept / size) if size else 1.0,
        gap=place.gap,
    )


def find_edges(passes: Passes, target: Target, effects: Effects, chosen: Chosen) -> tuple[list[Edge], list[str]]:
    """The edges between kept nodes, strongest first, and the nodes that could not be traced.

    In a frozen model error terms are constants, so that nothing feeds them.
    """
    by_layer = {place.place.layer: i for i, place in enumerate(effects.places)}
    goals = [
        Goal(node.id, by_layer[node.layer], node.position, node.latent)
        for node in chosen.nodes
        if node.kind == "latent" or (node.kind == "error" and passes.freeze is None)
    ]
    passed, causes, lost = trace(passes, target, goals, [place.slope for place in effects.places])
    nodes = {node.id: node for node in chosen.nodes}
    parts = _Parts.of(passed, chosen.nodes, by_layer)
    edges = [edge for cause in causes for edge in parts.edges(cause, nodes[cause.goal.id])]
    edges += [Edge(n.id, PREDICTION, n.direct, n.direct) for n in chosen.nodes[:-1]]
    return _kept(edges), lost


def _kept(edges: Iterable[Edge]) -> list[Edge]:
    ordered = sorted((e for e in edges if e.weight != 0), key=lambda e: -abs(e.effect))
    if not ordered:
        return []
    return [ordered[i] for i in _strongest(torch.tensor([e.effect for e in ordered]), EDGES, len(ordered))]


@dataclass
class _Parts:
    """What each kept node adds to the activations at its point, gathered by point."""

    nodes: list[list[Node]]  # per point
    vectors: list[Tensor]  # per point, [nodes, d]
    positions: list[Tensor]

    @classmethod
    def of(cls, passed: Pass, nodes: Sequence[Node], by_layer: dict[int, int]) -> _Parts:
        """The vectors of all nodes but the prediction."""
        n, blocks = len(passed.readings), list(passed.mlps)
        gathered: list[list[Node]] = [[] for _ in passed.points]
        vectors: list[list[Tensor]] = [[] for _ in passed.points]
        for node in nodes:
            if node.kind == "target":
                continue
            if node.kind in ("latent", "error"):
                point = by_layer[node.layer]
                vector = _vector(passed, point, node)
            else:
                point = n if node.kind == "embedding" else n + 1 + blocks.index(node.layer)
                vector = passed.points[point][0, node.position].detach()
            gathered[point].append(node)
            vectors[point].append(vector)
        stacked = [torch.stack(v) if v else p.new_zeros(0, p.shape[-1]) for v, p in zip(vectors, passed.points)]
        at = [torch.tensor([node.position for node in own], dtype=torch.int64) for own in gathered]
        return cls(gathered, stacked, at)

    def edges(self, cause: Causes, node: Node) -> Iterable[Edge]:
        """The edges into one node."""
        slope = node.effect / node.activation if node.activation else 1.0
        for own, vectors, positions, gradient in zip(self.nodes, self.vectors, self.positions, cause.gradients):
            if gradient is None or not own:
                continue
            weights = (vectors * gradient[positions.to(gradient.device)].to(vectors)).sum(dim=1)
            for source, weight in zip(own, weights.tolist()):
                yield Edge(source.id, node.id, weight, weight * slope)


def _vector(passed: Pass, place: int, node: Node) -> Tensor:
    reading = passed.readings[place]
    if node.latent is not None and node.activation is not None:
        return node.activation * reading.place.sae.W_dec[node.latent].detach()
    held = reading.point if node.position < reading.skip else reading.error
    return held[0, node.position].detach().to(reading.place.sae.W_dec)

"""``AttributionGraph``: which latents, error terms and tokens caused a prediction, and which fed which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from saelab.attribution.findings import Check, Faithfulness
from saelab.errors import UserError, near_matches

if TYPE_CHECKING:
    from saelab.runs import Run
    from saelab.steering import Intervention
    from saelab.steering.vectors import Strength

Kind = Literal["latent", "error", "embedding", "mlp", "target"]


@dataclass(frozen=True)
class Node:
    """One latent, error term, token or MLP at one position. Effects are in units of the target."""

    id: str  # layer_latent_position
    kind: Kind
    layer: int  # of its place; -1 for an embedding
    position: int
    effect: float  # along all paths
    direct: float  # along paths that avoid the other places
    latent: int | None = None
    activation: float | None = None
    label: str = ""

    @property
    def pole(self) -> int:
        """The sign of the activation."""
        return -1 if (self.activation or 0.0) < 0 else 1


@dataclass(frozen=True)
class Edge:
    """The direct effect of one node on another one.

    ``weight`` is the part of the target node's activation that the source gives, to first order; for an error term, and
    for the prediction itself, the part of its effect. ``effect`` is what reaches the prediction through this edge.
    """

    source: str
    target: str
    weight: float
    effect: float


@dataclass(frozen=True)
class PlaceSummary:
    """One place of the graph: what all its nodes together do, kept or not."""

    name: str  # hook name of what it explains
    layer: int
    run: str
    read: str
    latents: int  # that fired in the text
    kept: int
    latents_effect: float  # sum over all latents
    errors_effect: float
    rest_effect: float  # offset, skip connection
    share: float  # of the summed magnitudes that latents have; the rest is the error terms'
    kept_share: float  # of the summed magnitudes that the kept nodes have
    gap: float  # of integrated gradients


@dataclass
class AttributionGraph:
    """The explanation of one prediction.

    Attributes:
        value: The target: a logit (relative to the mean of all), a difference of two, or a log-probability.
        nodes: Those kept, strongest first; the prediction itself is the last.
        edges: Between kept nodes, strongest first.
        sums: How the direct effects add up: latents, errors, embedding, mlps, biases, gap. Exact in a frozen model.
        checks: What ablation says of the strongest nodes.
    """

    prompt: str
    tokens: list[str]
    token_ids: list[int]
    model: str
    target: str
    target_token: int
    target_text: str
    value: float
    probability: float
    mode: str
    integrated: int
    keep: float
    places: list[PlaceSummary]
    nodes: list[Node]
    edges: list[Edge]
    sums: dict[str, float]
    drift: float
    notes: list[str] = field(default_factory=list)
    checks: Check | None = None
    faithfulness: Faithfulness | None = None
    runs: list[Run] = field(default_factory=list, repr=False)  # of the places, empty for a graph that was read

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.id == name:
                return node
        raise UserError(f"the graph has no node {name!r}: {near_matches(name, [n.id for n in self.nodes])}")

    @property
    def latents(self) -> list[Node]:
        """The kept latents, strongest first."""
        return [node for node in self.nodes if node.kind == "latent"]

    @property
    def causes(self) -> list[Node]:
        """The kept latents that raise the target, strongest first."""
        return [node for node in self.latents if node.effect > 0]

    def place(self, node: Node) -> PlaceSummary:
        """The place of a latent or an error term."""
        return next(place for place in self.places if place.layer == node.layer)

    def into(self, name: str) -> list[Edge]:
        """The edges that end at a node, strongest first."""
        return [edge for edge in self.edges if edge.target == name]

    def out_of(self, name: str) -> list[Edge]:
        """The edges that begin at a node, strongest first."""
        return [edge for edge in self.edges if edge.source == name]

    def table(self) -> list[dict[str, Any]]:
        """One row per kept node, for a data frame."""
        return [asdict(node) | {"token": self.tokens[node.position]} for node in self.nodes if node.kind != "target"]

    def interventions(
        self,
        nodes: Iterable[Node | str],
        operation: str = "ablate",
        amount: Strength | None = None,
        *,
        at_positions: bool = False,
    ) -> list[Intervention]:
        """The steering of the chosen latents: ``ablate``, ``clamp`` or any other operation, on their poles.

        On every token, or with ``at_positions`` on those of the nodes alone. UserError for nodes that are no latents,
        and for a graph that was read from a file without its runs (:meth:`attach_runs`).
        """
        from saelab.steering import OPERATIONS

        if operation not in OPERATIONS:
            raise UserError(f"unknown operation {operation!r}: {near_matches(operation, OPERATIONS)}")
        chosen: dict[tuple[int, int, int], list[Node]] = {}
        for node in nodes:
            found = self[node] if isinstance(node, str) else node
            if found.kind != "latent" or found.latent is None:
                raise UserError(f"{found.id} is {_article(found.kind)}, not a latent; choose latents to steer")
            chosen.setdefault((found.layer, found.latent, found.pole), []).append(found)
        if not chosen:
            raise UserError("no latent was chosen; name nodes of the graph, e.g. 9_123_4")
        make = OPERATIONS[operation].on_latent
        found = []
        for (_, latent, pole), same in chosen.items():
            where = sorted(node.position for node in same) if at_positions else "all"
            found.append(make(self.run_of(same[0]), latent, amount, pole=pole, where=where))
        return found

    def attach_runs(self, runs: Sequence[Run]) -> None:
        """Give a graph that was read from a file its runs, in the order of ``places``."""
        if len(runs) != len(self.places):
            raise UserError(f"the graph has {len(self.places)} places, {len(runs)} runs were given")
        for run, place in zip(runs, self.places):
            if run.hook_name_out != place.name:
                raise UserError(f"{run.name or 'the run'} belongs to {run.hook_name}, the place is {place.name}")
        self.runs = list(runs)

    def run_of(self, node: Node) -> Run:
        """The run of a latent or an error term. UserError for a graph that was read without its runs."""
        if not self.runs:
            raise UserError("this graph was read without its runs; give them with attach_runs")
        return next(run for run, place in zip(self.runs, self.places) if place.layer == node.layer)


def _article(kind: str) -> str:
    return {"error": "an error term", "embedding": "a token", "mlp": "an MLP", "target": "the prediction"}[kind]


def node_id(layer: int, latent: int, position: int) -> str:
    """The name of a latent's node."""
    return f"{layer}_{latent}_{position}"

"""What caused a token: the effects of latents on a prediction, the graph of which fed which, and checks by ablation."""

from saelab.attribution.attribution import AttributeConfig, attribute
from saelab.attribution.findings import Ablated, Check, Faithfulness
from saelab.attribution.graph import AttributionGraph, Edge, Node, PlaceSummary
from saelab.attribution.viewers import read_graph, write_graph

__all__ = [
    "Ablated",
    "AttributeConfig",
    "AttributionGraph",
    "Check",
    "Edge",
    "Faithfulness",
    "Node",
    "PlaceSummary",
    "attribute",
    "read_graph",
    "write_graph",
]

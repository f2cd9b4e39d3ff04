"""Graphs as JSON in the form that circuit-tracer's local viewer and Neuronpedia read, and back.

The viewers' format knows latents of transcoders, error terms, tokens and logits. What it has no place for is in
``metadata.saelab``, which they leave alone, so that one file serves all three.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saelab._version import __version__
from saelab.attribution.feature_files import write_features
from saelab.attribution.findings import Ablated, Check, Faithfulness
from saelab.attribution.graph import AttributionGraph, Edge, Node, PlaceSummary
from saelab.errors import UserError, damaged
from saelab.files import write_json

FORMAT, VERSION = "saelab-attribution", 1
METADATA = "graph-metadata.json"
_TYPES = {"latent": "cross layer transcoder", "error": "mlp reconstruction error", "mlp": "mlp reconstruction error"}
_FIELDS = ("prompt", "token_ids", "model", "target", "target_token", "target_text", "value", "probability", "mode")
_FIELDS += ("integrated", "keep", "sums", "drift", "notes")


def write_graph(graph: AttributionGraph, path: Path | str, *, features: bool = False) -> Path:
    """Write the graph as ``path``, which :func:`read_graph` reads too.

    Beside it goes the list of graphs that circuit-tracer's server shows, and with ``features`` what the indexes of the
    runs know of each latent, in a folder ``features``.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise UserError(f"{path} does not end in .json; name a file such as graph.json")
    content = viewer_json(graph, path.stem)
    write_json(path, content)
    listing = path.parent / METADATA
    with damaged(listing, "remove it"):
        known = json.loads(listing.read_bytes())["graphs"] if listing.is_file() else []
    known = [entry for entry in known if entry.get("slug") != path.stem]
    write_json(listing, {"graphs": [*known, _listed(content["metadata"])]})
    if features:
        numbers = {node.id: _paired(node.layer, node.latent) for node in graph.latents if node.latent is not None}
        write_features(graph, path.parent, content["metadata"]["scan"], numbers)
    return path


def _listed(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "saelab"}


def viewer_json(graph: AttributionGraph, slug: str) -> dict[str, Any]:
    """The graph in the viewers' form."""
    ids, nodes = {}, []
    reached = 0.0
    size = sum(abs(node.effect) for node in graph.nodes if node.kind != "target") or 1.0
    for node in graph.nodes:
        reached += 0.0 if node.kind == "target" else abs(node.effect)
        entry = _node(graph, node)
        # The viewers hide nodes whose cumulative share is above a threshold.
        entry["influence"] = None if node.kind == "target" else min(1.0, reached / size)
        ids[node.id] = entry["node_id"]
        nodes.append(entry)
    scan = re.sub(r"[^A-Za-z0-9._-]+", "-", graph.model) or "model"
    own = {"format": FORMAT, "version": VERSION, "places": [asdict(place) for place in graph.places]}
    own |= {name: getattr(graph, name) for name in _FIELDS}
    own |= {"nodes": [asdict(node) for node in graph.nodes], "edges": [asdict(edge) for edge in graph.edges]}
    own["checks"] = None if graph.checks is None else asdict(graph.checks)
    own["faithfulness"] = None if graph.faithfulness is None else asdict(graph.faithfulness)
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": graph.tokens,
        "prompt": graph.prompt,
        "node_threshold": 1.0,
        "schema_version": 1,
        "info": {"description": graph.target, "generator": {"name": "saelab", "version": __version__}},
        "pruning_settings": {"node_threshold": graph.keep},
        "saelab": own,
    }
    params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    links = [{"source": ids[e.source], "target": ids[e.target], "weight": e.weight} for e in graph.edges]
    return {"metadata": metadata, "qParams": params, "nodes": nodes, "links": links}


def _node(graph: AttributionGraph, node: Node) -> dict[str, Any]:
    common = {
        "ctx_idx": node.position,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": node.label,
        "activation": node.activation,
    }
    if node.kind == "embedding":
        token = graph.token_ids[node.position]
        own = {"node_id": f"E_{token}_{node.position}", "feature": node.position, "layer": "E"}
        return common | own | {"feature_type": "embedding", "jsNodeId": f"E_{token}-{node.position}"}
    if node.kind == "target":
        token, layer = graph.target_token, node.layer
        own = {"node_id": f"{layer}_{token}_{node.position}", "feature": token, "layer": str(layer)}
        own |= {"feature_type": "logit", "jsNodeId": f"L_{token}-{node.position}", "token_prob": graph.probability}
        text = f'Output "{graph.target_text}" (p={graph.probability:.3f})'
        return common | own | {"is_target_logit": True, "clerp": text}
    if node.kind == "latent":
        assert node.latent is not None
        own = {"node_id": node.id, "feature": _paired(node.layer, node.latent)}
        own["jsNodeId"] = f"{node.layer}_{node.latent}-0"
    else:
        # An MLP that no transcoder replaces is all error; -2 keeps its name apart from that of an error term.
        number = -1 if node.kind == "error" else -2
        own = {"node_id": f"{node.layer}_{number}_{node.position}", "feature": number}
        own["jsNodeId"] = f"{node.layer}_{number}-{node.position}"
    return common | own | {"layer": str(node.layer), "feature_type": _TYPES[node.kind]}


def _paired(layer: int, latent: int) -> int:
    """One number for both, Cantor's pairing, as schema version 1 wants it."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def read_graph(path: Path | str) -> AttributionGraph:
    """A graph that :func:`write_graph` wrote. UserError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; name a graph that saelab attribute --out wrote")
    with damaged(path, "write the graph again"):
        metadata = json.loads(path.read_bytes())["metadata"]
        own = metadata.get("saelab") or {}
        if own.get("format") == FORMAT and own.get("version") == VERSION:
            return AttributionGraph(
                tokens=metadata["prompt_tokens"],
                places=[PlaceSummary(**place) for place in own["places"]],
                nodes=[Node(**node) for node in own["nodes"]],
                edges=[Edge(**edge) for edge in own["edges"]],
                checks=own["checks"] and Check([Ablated(**node) for node in own["checks"]["nodes"]]),
                faithfulness=own["faithfulness"] and Faithfulness(**own["faithfulness"]),
                **{name: own[name] for name in _FIELDS},
            )
    raise UserError(f"{path} is not a graph of saelab; one that another tool wrote opens in that tool's viewer")

"""What an index knows of the latents of a graph, as the files that circuit-tracer's viewer asks for on a click."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab.attribution.graph import AttributionGraph
from saelab.features import FeatureIndex
from saelab.files import write_json

GROUPS = {
    "top": "Top activations",
    "q75": "Upper quarter",
    "q50": "Third quarter",
    "q25": "Second quarter",
    "q00": "Lowest quarter",
    "random": "Random firings",
}


def write_features(graph: AttributionGraph, folder: Path, scan: str, numbers: dict[str, int]) -> int:
    """Write ``folder/features/scan/NUMBER.json`` for each kept latent whose run has an index; returns how many.

    ``numbers`` gives the viewer's number of each node.
    """
    written, place = set[int](), folder / "features" / scan
    place.mkdir(parents=True, exist_ok=True)
    for node in graph.latents:
        index, number = graph.run_of(node).index, numbers[node.id]
        if index is None or node.latent is None or number in written:
            continue
        pole = node.pole if node.pole in index.poles else 1
        write_json(place / f"{number}.json", _content(index, node.latent, pole, scan))
        written.add(number)
    return len(written)


def _content(index: FeatureIndex, latent: int, pole: int, scan: str) -> dict[str, Any]:
    row, examples = index.latent(latent, pole), index.examples(latent, pole)
    groups = []
    for kind, title in GROUPS.items():
        own = [example for example in examples if example.kind == kind]
        if own:
            groups.append(
                {
                    "quantile_name": title,
                    "examples": [
                        {
                            "tokens_acts_list": [float(value) for value in example.activations],
                            "train_token_ind": int(example.focus),
                            "is_repeated_datapoint": False,
                            "tokens": list(example.strings),
                        }
                        for example in own
                    ],
                }
            )
    largest = float(row["max"])
    return {
        "transcoder_id": scan,
        "index": latent,
        "examples_quantiles": groups,
        "top_logits": list(row.get("promoted") or []),
        "bottom_logits": list(row.get("suppressed") or []),
        # Activations are signed: of the negative pole they lie below zero.
        "act_min": 0.0 if pole > 0 else -largest,
        "act_max": largest if pole > 0 else 0.0,
        "quantile_values": [float(row[name]) for name in ("q05", "q25", "q50", "q75", "q95")],
        "histogram": [float(count) for count in row["histogram"]],
        "activation_frequency": float(row["density"]),
    }

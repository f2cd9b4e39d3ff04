"""A feature index as SAEDashboard's output folder, which Neuronpedia imports.

The folder holds ``batch-N.json`` (SAEDashboard's ``NeuronpediaDashboardBatch``), ``run_settings.json`` and
``skipped_indexes.json``. Latent ``j``'s negative pole, where there is one, is feature ``j + d_sae``, as in our exports
of signed SAEs. Correlated neurons and features are left empty: SAEDashboard expects Pearson correlations of activations
there, which an index does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features import FeatureIndex, LogitLens
from saelab.files import new_folder
from saelab.lm.hook_names import layer_of
from saelab.sae import SAE

BATCH = 128  # features a file, as SAEDashboard writes by default
ALIGNED = 3  # neurons in the table of alignment
BINS = 50  # of the histogram of logits
# kind of example -> its band of magnitudes, as columns of the index; a quarter of the firing tokens each
BANDS = {"q75": ("q75", "max"), "q50": ("q50", "q75"), "q25": ("q25", "q50"), "q00": (None, "q25")}
DIGITS = 3


def write_dashboard(
    index: FeatureIndex,
    sae: SAE,
    folder: Path | str,
    *,
    cache: ActivationCache | None = None,
    lens: LogitLens | None = None,
    sae_set: str = "saelab",
    max_latents: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the bundle of ``index`` (of ``sae``, raw units) into a new ``folder``; returns it.

    ``cache`` adds the corpus' name and size, ``lens`` the histograms of logits. Only the first ``max_latents`` latents
    are written where it is given. The folder appears complete or not at all.
    """
    folder, meta = Path(folder), index.meta
    if folder.exists():
        raise UserError(f"{folder} exists; name a new folder")
    if index.d_sae not in (sae.n_features, sae.d_sae):
        both = f"the SAE has {sae.n_features} latents, the index of {index.run_folder} {index.d_sae}"
        raise UserError(f"{both}; use its own")
    if max_latents is not None and max_latents < 1:
        raise UserError(f"max_latents={max_latents} must be at least 1")
    shown = min(max_latents or sae.n_features, sae.n_features)
    alive = index.table().set_index(["latent", "pole"])["count"]
    wanted = [(j, pole) for pole in index.poles for j in range(shown) if alive.loc[(j, pole)] > 0]
    numbers = [_number(j, pole, index.d_sae) for j, pole in wanted]
    corpus, layer = _corpus(cache, meta), layer_of(meta["hook_name"]) or 0  # the format has no value for "unknown"
    with new_folder(folder) as partial:
        for batch, start in enumerate(range(0, len(wanted), BATCH)):
            part = wanted[start : start + BATCH]
            features = list(_features(index, sae, part, corpus, lens))
            document = {"model_id": meta["model"], "layer": layer, "sae_set": sae_set}
            document |= {"sae_id_suffix": None, "features": features}
            (partial / f"batch-{batch}.json").write_text(json.dumps(document), encoding="utf-8")
            if progress is not None:
                progress(start + len(part), len(wanted))
        settings = {
            "sae_set": sae_set,
            "sae_path": str(index.run_folder),
            "outputs_dir": str(folder),
            **corpus.settings,
        }
        settings |= {"n_features_at_a_time": BATCH, "model_id": meta["model"], "layer": layer}
        (partial / "run_settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        skipped = sorted(set(range(index.d_sae * len(index.poles))) - set(numbers))
        names = {"model_id": meta["model"], "layer": str(layer), "sae_set": sae_set}
        (partial / "skipped_indexes.json").write_text(
            json.dumps({**names, "skipped_indexes": skipped}), encoding="utf-8"
        )
    return folder


class CorpusInfo:
    """What the bundle says about the text behind the index."""

    def __init__(self, name: str, contexts: int, length: int) -> None:
        self.name, self.contexts, self.length = name, contexts, length

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "huggingface_dataset_path": self.name,
            "n_prompts_total": self.contexts,
            "n_tokens_in_prompt": self.length,
        }


def _corpus(cache: ActivationCache | None, meta: dict[str, Any]) -> CorpusInfo:
    length = int(meta["context_length"])
    stored = max(length - int(meta["skip_first"]), 1)  # rows of a full context
    return CorpusInfo(cache.manifest.text if cache is not None else "", -(-meta["tokens"] // stored), length)


def _number(latent: int, pole: int, d_sae: int) -> int:
    return latent if pole > 0 else latent + d_sae


@torch.no_grad()
def _features(
    index: FeatureIndex, sae: SAE, wanted: list[tuple[int, int]], corpus: CorpusInfo, lens: LogitLens | None
) -> Iterator[dict[str, Any]]:
    rows = torch.stack([pole * sae.W_dec[j].float().cpu() for j, pole in wanted])
    effects = lens.effects(rows).cpu().numpy() if lens is not None else None
    edges = np.asarray(index.histogram_edges)
    middles = (edges[1:] + edges[:-1]) / 2
    for i, (j, pole) in enumerate(wanted):
        row, known = rows[i], index.latent(j, pole)
        values, neurons = row.topk(min(ALIGNED, len(row)))
        used = [b for b, count in enumerate(known["histogram"]) if count]
        heights, logits = ([], []) if effects is None else np.histogram(effects[i], BINS)
        yield {
            "feature_index": _number(j, pole, index.d_sae),
            "neuron_alignment_indices": neurons.tolist(),
            "neuron_alignment_values": _rounded(values),
            "neuron_alignment_l1": _rounded(values.abs() / row.abs().sum()),
            **{f"correlated_{what}": [] for what in CORRELATED},
            "neg_str": known["suppressed"],
            "neg_values": _rounded(known["suppressed_logits"]),
            "pos_str": known["promoted"],
            "pos_values": _rounded(known["promoted_logits"]),
            "frac_nonzero": known["density"],
            "freq_hist_data_bar_values": _rounded(middles[used]),
            "freq_hist_data_bar_heights": [float(known["histogram"][b]) for b in used],
            "logits_hist_data_bar_heights": [float(height) for height in heights],
            "logits_hist_data_bar_values": _rounded((np.asarray(logits)[1:] + np.asarray(logits)[:-1]) / 2),
            "n_prompts_total": corpus.contexts,
            "n_tokens_in_prompt": corpus.length,
            "dataset": corpus.name,
            "decoder_weights_dist": [],
            "activations": list(_activations(index, j, pole, known)),
            "vector": row.tolist(),
        }


CORRELATED = (
    *("neurons_indices", "neurons_l1", "neurons_pearson"),
    *("features_indices", "features_l1", "features_pearson"),
)


def _activations(index: FeatureIndex, latent: int, pole: int, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The windows of the index; magnitudes of this pole alone, since a feature of SAEDashboard has one."""
    for example in index.examples(latent, pole):
        if example.kind == "top":
            low, high, share = -1.0, known["max"], -1.0
        elif example.kind in BANDS:
            first, last = BANDS[example.kind]
            low, high, share = known[first] if first else 0.0, known[last], 0.25
        else:
            continue
        yield {
            "bin_min": round(low, DIGITS),
            "bin_max": round(high, DIGITS),
            "bin_contains": share,
            "tokens": example.strings,
            "values": _rounded([max(pole * value, 0.0) for value in example.activations]),
            "qualifying_token_index": example.focus,
        }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), DIGITS) for value in values]

"""``saelab index``: describe every latent of a run over an activation cache."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from einops import reduce

from saelab.cli.console import console, out, parse, part, print_json, stages
from saelab.cli.models import ModelOptions, complete_tokens, open_model
from saelab.cli.opening import open_with_cache, print_notes
from saelab.cli.placement import computing_device, follows, join, of_the_first
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import fit_remark
from saelab.evaluation.reconstruction import reconstruction
from saelab.features import FeatureIndex, IndexConfig, LogitLens, build_index
from saelab.layout import LOGIT_LENS
from saelab.lm import unembedding
from saelab.lm.record import ModelRecord
from saelab.sae import SAE

FIT_ROWS = 2048  # on which it is seen whether the SAE belongs to the cache


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run, and on what."""

    run: tyro.conf.Positional[str]
    """Folder of a run, or of another tool's SAE, or a hub id (hf://org/repo/path); features/ is written into the
    folder, for a hub id into a copy of it."""
    cache: Path
    """Folder of the activation cache."""
    target: Path | None = None
    """Folder of the cache of a transcoder's target; by default the one beside the cache that has its hook point."""
    keep_unembedding: bool = False
    """Keep the model's unembedding in the run folder (half precision), so that the next index needs no model."""
    out: Path | None = None
    """Copy the SAE into this folder and write features/ there. By default an SAE from the hub is copied into the
    working folder, under the name of its repository; other SAEs are not copied. A single file is converted."""
    overwrite: bool = False
    """Replace an existing index; the old one stays until the new one is complete."""
    json: bool = False
    """Print a summary as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class LensOptions(ModelOptions):
    """The model of the logit lens."""

    model: str | None = None
    """Language model of the logit lens; by default the one the cache was harvested from. "none" leaves it out."""


# The index's options come after ours in the list of fields, so they are the first base.
IndexOptions = dataclasses.make_dataclass("IndexOptions", [], bases=(IndexConfig, LensOptions, Options), frozen=True)


def main(args: Sequence[str]) -> None:
    """Build ``features/`` of a run folder."""
    options = parse(IndexOptions, "index", args, "Describe every latent of a trained SAE over a corpus.")
    config = part(IndexConfig, options)
    places, keep = (options.run, options.cache), options.keep_unembedding
    more = options.overwrite, keep, options.out, options.target
    index = run(*places, part(LensOptions, options), config, *more)
    if options.json:
        print_json(summary(index))
    else:
        show(index)


def run(
    name: Path | str,
    cache_folder: Path,
    model: LensOptions,
    config: IndexConfig,
    overwrite: bool = False,
    keep_unembedding: bool = False,
    out: Path | None = None,
    target: Path | None = None,
) -> FeatureIndex:
    """Load everything and build the index with a progress bar."""
    place = computing_device(model.device)
    join(model.tensor_parallel, place)
    opened, cache, folder = open_with_cache(name, cache_folder, out, target)
    opened.sae.to(place)
    record = ModelRecord.from_manifest(cache.manifest)
    # The unembedding kept in the run serves for the run's own model; a model given with --model is loaded.
    kept = None if model.model else LogitLens.open(folder / LOGIT_LENS, record.name, record.fingerprint)
    lens = load_lens(model, cache) if of_the_first(kept is None) else kept
    if follows():
        sys.exit(0)  # the rest needs no language model
    if keep_unembedding and lens is not None:
        lens.save(folder / LOGIT_LENS, model.model or record.name, record.fingerprint)
    if lens is None or lens is kept:
        complete_tokens(cache, None)
    print_notes(filter(None, [fit_remark(fit(opened.sae, cache))]))
    with stages() as progress:
        return build_index(opened.sae, cache, folder, lens=lens, config=config, progress=progress, overwrite=overwrite)


def fit(sae: SAE, cache: ActivationCache) -> float:
    """FVU on some rows of the cache: an index of an SAE that does not belong to it looks like any other."""
    split = "held_out" if cache.n_split("held_out") else "train"
    return reconstruction(sae, cache, split=split, max_tokens=FIT_ROWS)[0].estimates()["fvu"].value


def load_lens(options: LensOptions, cache: ActivationCache) -> LogitLens | None:
    """The unembedding of the model asked for; None, with a message, if no model is named."""
    record = ModelRecord.from_manifest(cache.manifest)
    if options.model == "none":
        return None
    if not options.model and not record.name:
        console.print("the cache names no model: the logit lens is left out; give one with --model")
        return None
    place = options.device if options.tensor_parallel else "cpu"
    model = open_model(dataclasses.replace(options, device=place), record, str(cache.path))
    complete_tokens(cache, model)
    weights = unembedding(model)
    del model
    gc.collect()  # a bridge refers to itself: without this the rest of the model would stay in memory
    if weights.weight.shape[0] != cache.goal.d_in:
        raise UserError(
            f"{options.model or record.name} unembeds d_in={weights.weight.shape[0]}, {cache.goal.path} holds "
            f"d_in={cache.goal.d_in}; give its own model with --model, or --model none"
        )
    return LogitLens(weights.weight, weights.norm_weight, weights.centred)


def summary(index: FeatureIndex) -> dict[str, Any]:
    """The numbers of an index."""
    table = index.table()
    count, density = table["count"].to_numpy(), table["density"].to_numpy()
    fired = reduce(count, "(latent pole) -> latent", "sum", latent=index.d_sae)
    return {
        "latents": index.d_sae,
        "poles": list(index.poles),
        "tokens": index.meta["tokens"],
        "never_fired": int(np.count_nonzero(fired == 0)),
        "denser_than_0.1": int(np.count_nonzero(density > 0.1)),
        "labelled": int(np.count_nonzero(table["label"].to_numpy() != "")),
        "logit_lens": index.meta["logit_lens"],
        "seconds": index.meta["seconds"],
        "encode_seconds": index.meta["encode_seconds"],
        "tokens_per_second": index.meta["tokens_per_second"],
    }


def show(index: FeatureIndex) -> None:
    """Print the summary as text."""
    found, what = summary(index), "latents" if len(index.poles) == 1 else "poles"
    out.print(
        f"{found['latents']:,} latents over {found['tokens']:,} tokens in {found['seconds']:.1f} s "
        f"({found['tokens_per_second']:,.0f} tokens/s)"
    )
    out.print(
        f"{found['never_fired']:,} never fired; {found['denser_than_0.1']:,} {what} fire on more than 10 % of tokens, "
        f"{found['labelled']:,} {what} are labelled; logit lens: {'yes' if found['logit_lens'] else 'no'}"
    )
    out.print(f"saved to {index.folder}", markup=False, soft_wrap=True)

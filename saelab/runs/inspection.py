"""Describe a checkpoint: format, shapes, norms, hook point, dead latents, and anything unusual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, damaged
from saelab.evaluation import fit_remark
from saelab.interop.reading import read_json, read_tensors
from saelab.layout import EVALUATION
from saelab.runs.run import Run
from saelab.sae import SAE
from saelab.training.config import check_target

DEAD_RATIO = 1e-3  # an encoder this much shorter than the median is taken for collapsed
SILENT = -9.5  # SAELens stores log10(firing rate + 1e-10): below this a latent did not fire once
SPARSITY = "sparsity.safetensors"
PREPARATION = ("context_size", "prepend_bos", "dataset_path")  # how the activations were prepared
KNOWN = ("model_name", "hook_name", "hf_hook_name")


@torch.no_grad()
def inspect(
    path: Path | str,
    cache: ActivationCache | None = None,
    max_rows: int = 65_536,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Facts about the SAE at ``path`` as a flat dictionary; ``notes`` lists oddities, one sentence each.

    ``dead_estimate`` counts latents that do not fire: on the first ``max_rows`` rows of ``cache`` where one is given
    (``fvu`` then tells how well the SAE explains them; both are measured on ``device``), else by the record in the
    folder, else by encoders that have collapsed; ``dead_estimate_from`` says which. ``options`` are those of
    :func:`saelab.load`.
    """
    run = Run.open(path, **options)
    sae, metadata, notes = run.sae, run.recorded, run.notes
    norms = sae.directions.float().norm(dim=1)
    facts = {
        "path": str(path),
        "format": run.format,
        "variant": sae.variant,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "parameters": sum(p.numel() for p in sae.parameters()),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "config": {k: v for k, v in sae.config.items() if k not in {"d_in", "d_sae"}},
        "model": metadata.get("model_name"),
        "hook": metadata.get("hook_name") or metadata.get("hf_hook_name"),
        **({"d_out": sae.d_out, "hook_out": metadata.get("hook_name_out")} if sae.transcodes else {}),
        "collection": metadata.get("collection"),
        "trained_on": {name: metadata[name] for name in PREPARATION if metadata.get(name) is not None},
        "known_from": {name: run.known_from[name] for name in KNOWN if name in run.known_from},
        "decoder_norm": _spread(norms),
        "b_dec_norm": sae.b_dec.norm().item(),
        "notes": notes,
    }
    if (norms - 1).abs().max() > 1e-3:
        notes.append("decoder rows are not of unit norm")
    if not facts["hook"]:
        notes.append("the hook point is not recorded")
    _encoder(sae, facts, notes)
    _recorded(Path(run.path or path), sae, facts)
    if cache is not None:
        _measured(sae.to(device), cache, max_rows, facts)
        notes.extend(filter(None, [fit_remark(facts["fvu"] or 0.0)]))
    if facts.get("dead_estimate"):
        notes.append(f"{facts['dead_estimate']} latents are dead by {facts['dead_estimate_from']}")
    return facts


def _encoder(sae: SAE, facts: dict[str, Any], notes: list[str]) -> None:
    W_enc = getattr(sae, "W_enc", None)
    if W_enc is None:
        return
    norms = W_enc.float().norm(dim=0)
    facts["encoder_norm"] = _spread(norms)
    facts["dead_estimate"] = int((norms < DEAD_RATIO * norms.median()).sum())
    facts["dead_estimate_from"] = "collapsed encoders"
    if sae.transcodes:
        return  # the two directions of a latent lie in different spaces
    alignment = torch.nn.functional.cosine_similarity(W_enc.float().T, sae.directions.float(), dim=1)
    facts["encoder_decoder_cosine"] = alignment.median().item()
    if alignment.median() < 0:
        notes.append("encoder and decoder point in opposite directions: a transposed or wrong matrix?")


def _recorded(path: Path, sae: SAE, facts: dict[str, Any]) -> None:
    """What the folder itself says about dead latents: SAELens' firing rates, or our own evaluation."""
    if (path / SPARSITY).is_file():
        rates = read_tensors(path / SPARSITY).get("sparsity")
        if isinstance(rates, Tensor) and rates.shape == (sae.n_features,):
            facts["dead_estimate"], facts["dead_estimate_from"] = int((rates < SILENT).sum()), SPARSITY
        return
    file = path / EVALUATION
    evaluation = read_json(file) if file.is_file() else {}
    if "saelab_version" in evaluation:  # another tool may call its own results so
        with damaged(file, "evaluate it again"):
            dead = evaluation["metrics"]["dead_fraction"]
            facts["dead_estimate"] = round(dead["value"] * dead["n"])  # of latents, bookkeeping ones left out
            facts["dead_estimate_from"] = f"its evaluation on {evaluation['density_histogram']['tokens']:,} tokens"


def _measured(sae: SAE, cache: ActivationCache, max_rows: int, facts: dict[str, Any]) -> None:
    if cache.d_in != sae.d_in:
        raise UserError(f"the SAE reads d_in={sae.d_in}, {cache.path} holds d_in={cache.d_in}; use the cache it saw")
    fired = torch.zeros(sae.n_features, dtype=torch.bool)
    check_target(sae, cache)
    error = square = 0.0
    rows, mean = 0, torch.tensor(cache.goal.manifest.mean, dtype=torch.float64)
    shift = torch.zeros_like(mean)
    for batch in cache.head(max_rows):
        x = batch.acts
        code = sae.encode(x.to(sae.device))
        fired[sae.features(code).nonzero().indices.cpu().long()] = True
        goal = x if batch.target is None else batch.target
        error += (goal - sae.reconstruct(x.to(sae.device), code).cpu()).double().square().sum().item()
        y = goal.double() - mean  # of the whole cache: close enough to lose no digits, and replaced below
        square, shift = square + y.square().sum().item(), shift + y.sum(dim=0)
        rows += len(x)
    total = square - shift.square().sum().item() / rows
    facts["fvu"] = error / total if total > 1e-12 * square else None
    facts["dead_estimate"], facts["dead_estimate_from"] = int((~fired).sum()), f"{rows} rows of {cache.path}"


def _spread(values: Tensor) -> dict[str, float]:
    return {"min": values.min().item(), "median": values.median().item(), "max": values.max().item()}

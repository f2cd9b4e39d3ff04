"""Causes of dead latents, and the properties that ultra-dense latents follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.features.index import FeatureIndex
from saelab.sae import SAE, LinearSAE
from saelab.sae.base import unit_rows
from saelab.sae.gated import GatedSAE

CAUSES = {
    "rare": "it fires on tokens examined here that its count does not cover",
    "duplicate": "its decoder row repeats that of a living latent, which is selected instead",
    "encoder collapsed": "its encoder vector is too short for it to be selected",
    "threshold too high": "its pre-activation was positive, but never above its own threshold",
    "out-competed": "its pre-activation was positive, but others were larger every time",
    "bias too low": "without its encoder bias it would have fired",
    "no magnitude": "its gate opened, but the magnitude that goes with it was not positive then",
    "never fired": "its pre-activation was never positive, with or without its bias",
    "not examined": "no cause in the weights; give activations to look further",
}
EVIDENCE = ("best", "best_without_bias", "shortfall", "gain")


@torch.no_grad()
def causes_of_death(
    sae: SAE,
    counts: Int[np.ndarray, " d_sae"],
    cache: ActivationCache | None = None,
    *,
    tokens: int = 16_384,
    duplicate: float = 0.95,
    collapsed: float = 0.1,
) -> pd.DataFrame:
    """One row per latent that never fired, with the first cause in CAUSES that applies and the evidence for it.

    ``counts [d_sae]`` are firings (both poles together). ``duplicate`` is the cosine with a living latent's decoder
    row from which a latent counts as its duplicate (absolute cosine for signed SAEs), ``collapsed`` the share of the
    living latents' median encoder norm below which an encoder has collapsed. Up to ``tokens`` rows of ``cache``,
    spread over all of it, are encoded for the other causes; without a cache they stay "not examined".

    Columns: latent, cause, neighbour (nearest living latent, -1 if none lives), cosine, encoder_norm, encoder_bias,
    best (largest pre-activation, or magnitude), best_without_bias, shortfall (smallest distance, over the tokens, to
    the smallest activation that did win; to its own threshold in an SAE that has one per latent), gain. The last four
    are NaN where not examined. Of an SAE that reads normalised activations, pre-activations are in those units.

    ``gain`` is what reviving the latent could bring at most: the share of the squared reconstruction error that its
    decoder row removes when it fires, beside the others, with the best non-negative (signed SAEs: any) activation on
    every token, ``sum_t max(0, <x_t - recon_t, d>)^2 / sum_t |x_t - recon_t|^2`` for the unit row ``d``. A random
    direction reaches ``1 / (2 d_out)`` (signed: ``1 / d_out``) of an error that has no preferred direction. Only of a
    transcoder is ``d_out`` not ``d_in``.
    """
    fires = torch.from_numpy(np.asarray(counts) > 0)[: sae.n_features]
    dead, alive = (~fires).nonzero().flatten(), fires.nonzero().flatten()
    inner = sae.reader
    neighbour, cosine = _nearest(sae, dead, alive)
    W_enc, b_enc = _encoder(inner)
    norms = W_enc.norm(dim=0)
    table = pd.DataFrame(
        {
            "latent": dead.numpy(),
            "cause": "not examined",
            "neighbour": neighbour.numpy(),
            "cosine": cosine.numpy(),
            "encoder_norm": norms[dead].numpy(),
            "encoder_bias": b_enc[dead].numpy(),
        }
    )
    typical = float(norms[alive].median()) if len(alive) else float(norms.median())
    examined = None if cache is None or not len(dead) else _examine(sae, dead, cache, tokens)
    cut = inner.inference_threshold() if isinstance(inner, LinearSAE) else None
    own = None if cut is None or cut.ndim == 0 else cut[dead.to(cut.device)].float().cpu().numpy()
    if own is not None and examined is not None:
        examined["shortfall"] = own - examined["best"]  # latents do not compete: each has its own threshold
    for name in EVIDENCE:
        table[name] = np.nan if examined is None else examined[name]
    similarity = np.abs(cosine.numpy()) if sae.signed else cosine.numpy()
    lost = "no magnitude" if isinstance(inner, GatedSAE) else "out-competed" if own is None else "threshold too high"
    rules = [
        ("rare", np.zeros(len(dead), bool) if examined is None else examined["fires"]),
        ("duplicate", similarity >= duplicate),
        ("encoder collapsed", norms[dead].numpy() < collapsed * typical),
        (lost, table["best"].to_numpy() > 0),
        ("bias too low", table["best_without_bias"].to_numpy() > 0),
        ("never fired", table["best_without_bias"].to_numpy() <= 0),
    ]
    table["cause"] = np.select([rule for _, rule in rules], [name for name, _ in rules], "not examined")
    return table


def _encoder(sae: SAE) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
    """Encoder and bias; the decoder's transpose and zero for a variant that correlates with its dictionary."""
    parameters = dict(sae.named_parameters())
    W_enc, b_enc = parameters.get("W_enc"), parameters.get("b_enc")
    weights = sae.W_dec.T if W_enc is None else W_enc
    bias = torch.zeros(sae.d_sae) if b_enc is None else b_enc.detach().float().cpu()
    return weights.detach().float().cpu(), bias


def _nearest(sae: SAE, dead: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """The living latent whose decoder row is closest to each dead one's, and the cosine."""
    if not len(alive):
        return torch.full((len(dead),), -1), torch.full((len(dead),), torch.nan)
    unit = unit_rows(sae.W_dec.detach().float().cpu())
    numbers, cosines = [], []
    for part in dead.split(1024):
        similarity = unit[part] @ unit[alive].T
        best = (similarity.abs() if sae.signed else similarity).argmax(1, keepdim=True)
        numbers.append(alive[best[:, 0]])
        cosines.append(similarity.gather(1, best)[:, 0])
    return torch.cat(numbers) if numbers else dead.clone(), torch.cat(cosines) if cosines else torch.zeros(0)


def _examine(sae: SAE, dead: Tensor, cache: ActivationCache, tokens: int) -> dict[str, np.ndarray]:
    """What EVIDENCE names, for each dead latent, and whether it fires."""
    inner = sae.reader
    W_enc, b_enc = _encoder(inner)
    W, b = W_enc[:, dead], b_enc[dead]
    offset = inner.b_in
    offset = torch.zeros(()) if offset is None else offset.detach().float().cpu()
    best, bare, shortfall = (torch.full((len(dead),), value) for value in (-torch.inf, -torch.inf, torch.inf))
    rows = unit_rows(sae.W_dec.detach().float().cpu())[dead]
    removed, error, fired = torch.zeros(len(dead), dtype=torch.float64), 0.0, torch.zeros(sae.d_sae, dtype=torch.bool)
    with sae.evaluating():
        for acts, goal in _rows(cache, tokens):
            x = acts.to(sae.device)
            read = sae.as_read(x)
            code = inner.encode(read).to("cpu").nonzero()
            fired[code.indices] = True
            smallest = torch.full((code.n,), torch.inf).scatter_reduce(0, code.rows(), code.values.abs(), "amin")
            raw = (read.float().cpu() - offset) @ W
            size, plain = ((raw + b).abs(), raw.abs()) if sae.signed else (raw + b, raw)
            best, bare = torch.maximum(best, size.amax(0)), torch.maximum(bare, plain.amax(0))
            shortfall = torch.minimum(shortfall, (smallest[:, None] - size).amin(0))
            recon = sae(x) if inner is not sae else sae.reconstruct(x, code.to(sae.device))
            residual = goal - recon.float().cpu()
            along = residual @ rows.T
            removed += (along if sae.signed else along.clamp_min(0.0)).double().square().sum(0)
            error += float(residual.double().square().sum())
    gain = removed / error if error else removed
    found = zip(EVIDENCE, (best, bare, shortfall, gain), strict=True)
    return {name: values.numpy() for name, values in found} | {"fires": fired[dead].numpy()}


def _rows(
    cache: ActivationCache, tokens: int, batch: int = 2048
) -> Iterator[tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]]:
    """Up to ``tokens`` rows spread evenly over a cache, and what an SAE reconstructs of them."""
    n = min(tokens, cache.n_rows)
    rows = torch.arange(n) * cache.n_rows // n
    for part in rows.split(batch):
        found = cache.read(part)
        yield found.acts, found.acts if found.target is None else found.target


AUDIT = {
    "position_corr": "position",
    "first_corr": "first token of the context",
    "norm_corr": "norm of the activation",
    "frequency_corr": "token frequency",
    "mean_cosine": "mean of the activations",
}


def audit_dense(index: FeatureIndex, density: float = 0.1, strength: float = 0.3) -> pd.DataFrame:
    """The (latent, pole)s denser than ``density``, densest first, each with what it follows most closely.

    ``follows`` is the property with the largest absolute correlation (or, for the mean, cosine of the decoder row),
    given as ``strength``; "nothing tested" where none reaches the threshold. The measures themselves are columns too.
    """
    table: Any = index.table()
    table = table[table["density"] > density].sort_values(by="density", ascending=False)
    measures = table[list(AUDIT)].fillna(0.0).to_numpy()
    best = np.abs(measures).argmax(1)
    found = measures[np.arange(len(table)), best]
    names = np.array(list(AUDIT.values()), dtype=object)[best]
    out = table[["latent", "pole", "density", "mean", "label", *AUDIT]].copy()
    out.insert(3, "follows", np.where(np.abs(found) >= strength, names, "nothing tested"))
    out.insert(4, "strength", found)
    return out.reset_index(drop=True)

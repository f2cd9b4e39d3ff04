"""Controls that need no training: the SAE before its first step, directions at random, and the channels themselves."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import SAE, LinearSAE, build
from saelab.sae.base import unit_rows
from saelab.training import TrainConfig, start
from saelab.training.loop import sample_of

SAMPLE = 4096  # training rows that the scale of a control's values is fitted to


@torch.no_grad()
def untrained(sae: SAE, cache: ActivationCache, seed: int = 0) -> SAE:
    """An SAE of the same variant, size and options as training would start with: random unit directions, the encoder
    their transpose, the centre and the thresholds of inference set on training rows."""
    fresh = seeded(sae, seed)
    state = start(fresh, cache, TrainConfig())
    state.unfold(fresh)
    fresh.schedule(1, 1)  # the options of the end of training
    fresh.normalise_decoder()
    fresh.eval()
    fresh.calibrate([sample_of(cache).to(fresh.device)])
    state.fold(fresh)
    return fresh


def random_directions(sae: SAE, cache: ActivationCache, l0: float, seed: int = 0) -> SAE:
    """As many directions as the SAE has latents, each the difference of two random training activations at unit norm,
    of which a token uses the ``l0`` it projects most on.

    Such directions have the covariance of the activations, which directions of an untrained SAE have not.
    """
    generator = torch.Generator().manual_seed(seed)
    first, stop = cache.split_rows("train")
    if stop - first < 2:
        raise UserError(f"{cache.path} has {stop - first} training rows, too few to draw directions from")
    pairs = first + torch.randint(stop - first, (2, sae.n_features), generator=generator)
    a, b = (cache.read(rows).acts for rows in pairs)
    return _tied(a - b, sae, cache, l0)


def raw_channels(sae: SAE, cache: ActivationCache, l0: float) -> SAE:
    """The channels of the activations as latents, of which a token uses the ``l0`` largest magnitudes.

    An SAE without signs has two latents for a channel, for values above and below the mean.
    """
    axes = torch.eye(sae.d_in)
    return _tied(axes if sae.signed else torch.cat([axes, -axes]), sae, cache, l0)


def seeded(sae: SAE, seed: int) -> SAE:
    """An SAE of the same variant, size and options with random weights. UserError where it cannot be built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build(sae.variant, **{"d_in": sae.d_in, "d_sae": sae.d_sae} | sae.config)
    return fresh.to(sae.device)


@torch.no_grad()
def _tied(directions: Float[Tensor, "m d_in"], sae: SAE, cache: ActivationCache, l0: float) -> SAE:
    k = max(1, min(round(l0), len(directions)))
    made = build("abs_topk" if sae.signed else "topk", d_in=sae.d_in, d_sae=len(directions), k=k)
    assert isinstance(made, LinearSAE)
    made.W_dec.copy_(unit_rows(directions.float()))
    made.W_enc.copy_(made.W_dec.T)
    made.b_dec.copy_(torch.tensor(cache.manifest.mean))
    made.eval()
    # One factor for all values, the best on training rows: directions that overlap count a token's energy many times.
    x = cache.read(cache.spread_rows(SAMPLE, "train")).acts
    recon, wanted = ((rows - made.b_dec).double() for rows in (made(x), x))  # whose squares may exceed float32
    energy = float(recon.square().sum())
    if energy > 0:
        made.W_enc.mul_(max(float((recon * wanted).sum()) / energy, 0.0))
    return made.to(sae.device)

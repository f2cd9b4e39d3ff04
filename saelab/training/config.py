"""The training configuration: one flat dataclass, checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_type_hints

import torch

from saelab import kernels
from saelab.data.cache import ActivationCache
from saelab.distributed import SINGLE, Parallel
from saelab.errors import UserError, check_choices
from saelab.sae import SAE, LinearSAE
from saelab.training.rate import Rate, automatic


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Counts are in tokens unless the name says steps; shares are of the whole run's steps."""

    epochs: int = 10
    """Passes over the training split of the cache."""
    batch_size: int = 2048
    """Tokens per step."""
    lr: float | Literal["auto"] = "auto"
    """Adam's learning rate; auto computes it by a measured rule."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    decay: Literal["none", "linear", "cosine"] = "linear"
    """How the learning rate falls to zero at the end."""
    decay_share: float = 0.2
    """Share of the steps over which it falls."""
    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; none to leave it alone."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK loss that revives dead latents; 0 turns it off."""
    k_aux: int | None = None
    """Dead latents per token in AuxK; by default the power of two nearest to half the width that they write."""
    aux_gradient: Literal["rectified", "straight_through"] = "rectified"
    """What AuxK's gradient does at a negative pre-activation of a latent that it chose: stop, as in the paper, or pass,
    which also revives latents that are negative everywhere (docs/learning-rate.md)."""
    dead_after: int | None = None
    """Tokens without firing after which a latent is dead; by default a tenth of the run, at most 10 million."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights (0.999, for example); the average is saved."""
    precision: kernels.Precision = "auto"
    """Arithmetic of the matrix product that selects latents: bf16 rounds its operands, and the values of what it finds
    are computed in fp32; auto is bf16 on a GPU made for it, else fp32 (docs/kernels.md)."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What Adam's two moments are kept in; bf16, rounded at random, takes half of their memory and saves a GPU a fifth
    to a quarter of the optimizer's time."""
    freeze: Literal["none", "decoder", "encoder"] = "none"
    """Leave the dictionary, or the encoder's matrix, at its random initialisation: the controls of arXiv 2602.14111."""
    seed: int = 0
    """Seed of the initialisation and of everything random inside a step."""
    data_seed: int = 0
    """Seed of the data order; SAEs trained with the same one see the same batches."""

    def __post_init__(self) -> None:
        check_choices(vars(self), get_type_hints(TrainConfig))
        for name in ("epochs", "batch_size", "k_aux", "dead_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.lr != "auto" and (isinstance(self.lr, str | None) or not 0 < self.lr < math.inf):
            raise UserError(f"lr={self.lr} must be positive and finite, or auto")
        if self.grad_clip is not None and not 0 < self.grad_clip < math.inf:
            raise UserError(f"grad_clip={self.grad_clip} must be positive and finite")
        for name in ("warmup", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is a share of the run, between 0 and 1")
        if self.warmup + self.decay_share > 1:
            raise UserError(f"warmup={self.warmup} and decay_share={self.decay_share} must add up to at most 1")
        if not 0 <= self.aux_weight < math.inf:
            raise UserError(f"aux_weight={self.aux_weight} must be 0 or positive")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema={self.ema} is a decay per step, strictly between 0 and 1 (0.999, say)")

    @property
    def rate(self) -> float:
        """The learning rate as a number. ValueError where it is still to be chosen (see :func:`prepared`)."""
        return float(self.lr)

    @property
    def dead_limit(self) -> int:
        """``dead_after``. ValueError where it is still to be chosen (see :func:`prepared`)."""
        return _chosen("dead_after", self.dead_after)

    @property
    def aux_count(self) -> int:
        """``k_aux``. ValueError where it is still to be chosen (see :func:`prepared`)."""
        return _chosen("k_aux", self.k_aux)

    def on(self, device: torch.device) -> TrainConfig:
        """The same configuration with the precision that ``auto`` comes to on a device."""
        return replace(self, precision=kernels.arithmetic(self.precision, device))

    def resolved(self, sae: SAE, cache: ActivationCache, fine_tuning: bool = False) -> TrainConfig:
        """The same configuration with every data-dependent default filled in."""
        total = self.epochs * cache.n_split("train")
        values = asdict(self)
        values["lr"] = chosen_rate(sae, cache, self, fine_tuning).value
        if self.k_aux is None:
            values["k_aux"] = 2 ** round(math.log2(max(sae.d_out / 2, 1)))
        if self.dead_after is None:
            values["dead_after"] = max(1, min(10_000_000, total // 10))
        found = TrainConfig(**values)
        return found if sae.device.type == "meta" else found.on(sae.device)  # the whole of a shard has no device


def _chosen(name: str, value: int | None) -> int:
    if value is None:
        raise ValueError(f"{name} depends on the run and is not filled in; train with what prepared() returns")
    return value


def chosen_rate(sae: SAE, cache: ActivationCache, config: TrainConfig, fine_tuning: bool = False) -> Rate:
    """The learning rate of a run: the one in ``config``, or what the rule gives for it."""
    if config.lr != "auto":
        return Rate(config.rate, "as given")
    steps = config.epochs * (cache.n_split("train") // config.batch_size)
    k = sae.config.get(sae.l0_option)
    return automatic(
        sae.d_sae, steps, config.batch_size, d_in=sae.d_in, k=k, factor=sae.rate_factor, fine_tuning=fine_tuning
    )


def prepared(
    sae: SAE,
    cache: ActivationCache,
    config: TrainConfig | None = None,
    parallel: Parallel = SINGLE,
    fine_tuning: bool = False,
) -> TrainConfig:
    """Check ``config`` and fill in its defaults. Raises UserError for a run that cannot work.

    ``sae`` is the whole SAE, also where processes hold it in shards. ``fine_tuning`` says that it is trained already.
    """
    config = (config or TrainConfig()).resolved(sae, cache, fine_tuning)
    check(sae, cache, config, parallel)
    return config


def check(sae: SAE, cache: ActivationCache, config: TrainConfig, parallel: Parallel = SINGLE) -> None:
    """Refuse a run that cannot work, before anything is computed."""
    if config.batch_size % parallel.data_size:
        raise UserError(
            f"batch_size={config.batch_size} does not divide over {parallel.data_size} data ranks; choose a multiple"
        )
    if cache.d_in != sae.d_in:
        raise UserError(
            f"the SAE reads width d_in={sae.d_in} but the cache holds width {cache.d_in}; "
            "use a cache of its own hook point"
        )
    check_target(sae, cache)
    if cache.goal.manifest.variance == 0:
        raise UserError(
            f"all activations of {cache.goal.path} are the same (variance zero): there is nothing to learn; harvest "
            "others"
        )
    if sae.needs_grads and not cache.has_grads:
        raise UserError(f"{sae.variant} needs gradients and the cache has none; harvest it with --gradients")
    if cache.rolled is not None and config.epochs != 1:
        raise UserError(
            f"epochs={config.epochs}: a rolling cache is read once, and begins its text again by itself; use epochs=1 "
            "and more tokens"
        )
    if config.freeze == "encoder" and not hasattr(sae, "W_enc"):
        raise UserError(f"a {sae.variant} SAE has no encoder matrix that could be frozen; freeze the decoder")
    if config.batch_size > cache.n_split("train"):
        raise UserError(
            f"batch_size={config.batch_size} exceeds the {cache.n_split('train')} training rows of the cache; "
            "lower it or harvest more tokens"
        )
    if type(sae).aux_latents is not SAE.aux_latents and not isinstance(sae, LinearSAE):
        raise UserError(
            f"the auxiliary loss of {sae.variant} needs pre-activations; derive it from LinearSAE, or drop aux_latents"
        )


def check_target(sae: SAE, cache: ActivationCache) -> None:
    """Refuse a transcoder without a target, an SAE with one, and a target of another width than its dictionary's."""
    if cache.target is None:
        if sae.transcodes:
            raise UserError(
                f"the SAE is a transcoder and {cache.path} has no target; give the target's cache (--target)"
            )
    elif not sae.transcodes:
        raise UserError(f"the SAE reconstructs its input; build it with d_out={cache.target.d_in} to have a target")
    elif cache.target.d_in != sae.d_out:
        raise UserError(
            f"the SAE writes width d_out={sae.d_out} but the target {cache.target.path} has width "
            f"{cache.target.d_in}; use the target it was made for"
        )


def target_width(cache: ActivationCache, given: int | None) -> int | None:
    """The width of the target; None without one. UserError where it is not the input's and nobody said so."""
    if cache.target is None:
        if given is not None:
            raise UserError(f"d_out={given} is the width of a target, and there is none; name its cache as the target")
        return None
    found = cache.target.d_in
    if given is None and found != cache.d_in:
        raise UserError(
            f"the target {cache.target.path} has width {found}, not {cache.d_in} as the input; give d_out={found} if "
            "that is meant"
        )
    if given is not None and found != given:
        raise UserError(f"the target {cache.target.path} has width {found}, not d_out={given}; correct one of them")
    return found


def n_steps(cache: ActivationCache, config: TrainConfig) -> int:
    """Steps of a whole run."""
    return config.epochs * cache.n_batches(config.batch_size, split="train", drop_last=True)

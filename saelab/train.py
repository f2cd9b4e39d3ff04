"""The training loop, as a generator: the command line prints, the notebook plots, the app draws, all over this."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saelab import losses
from saelab.data.cache import ActivationCache, Batch
from saelab.errors import UserError
from saelab.sae import SAE, LinearSAE


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Counts are in tokens unless the name says steps."""

    epochs: int = 10
    """Passes over the training split of the cache."""
    batch_size: int = 2048
    """Tokens per step."""
    lr: float | None = None
    """Adam's learning rate; by default 2e-4 / sqrt(d_sae / 2^14) (Gao et al., 2024, figure 3)."""
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
    """Dead latents per token in AuxK; by default the power of two nearest to d_in / 2."""
    dead_after: int | None = None
    """Tokens without firing after which a latent is dead; by default a tenth of the run, at most 10 million."""
    seed: int = 0
    """Seed of the data order."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"lr={self.lr} must be positive")
        if not 0 <= self.warmup + self.decay_share <= 1:
            raise UserError(f"warmup={self.warmup} and decay_share={self.decay_share} must add up to at most 1")

    def resolved(self, sae: SAE, cache: ActivationCache) -> TrainConfig:
        """The same configuration with every default that depends on the data written out."""
        total = self.epochs * cache.n_split("train")
        values = asdict(self)
        values["lr"] = self.lr or 2e-4 / math.sqrt(sae.d_sae / 2**14)
        values["k_aux"] = self.k_aux or 2 ** round(math.log2(max(sae.d_in / 2, 1)))
        values["dead_after"] = self.dead_after or max(1, min(10_000_000, total // 10))
        return TrainConfig(**values)


@dataclass
class TrainState:
    """Everything besides the weights that the next step depends on."""

    optimizer: torch.optim.Optimizer
    tokens_since_fired: Tensor  # [d_sae], int64
    scale: float  # the data are multiplied by this power of two during training
    variance: float  # mean ||x - mean||^2 of the scaled data: the normaliser of every loss term
    step: int = 0
    tokens_seen: int = 0

    def n_dead(self, dead_after: int) -> int:
        return int((self.tokens_since_fired > dead_after).sum())


@dataclass(frozen=True)
class StepMetrics:
    """What one step reports. ``fvu`` is of this batch, against the variance of the whole cache."""

    step: int
    tokens: int
    loss: float
    fvu: float
    l0: float
    dead: int
    lr: float
    grad_norm: float
    terms: dict[str, float]  # weighted loss terms besides the reconstruction
    diagnostics: dict[str, float]  # the variant's own numbers, a threshold for instance

    def row(self) -> dict[str, Any]:
        """One flat record for ``metrics.jsonl``."""
        row = asdict(self)
        terms, diagnostics = row.pop("terms"), row.pop("diagnostics")
        return {**row, **terms, **diagnostics}


def start(sae: SAE, cache: ActivationCache, config: TrainConfig, sample: int = 32_768) -> TrainState:
    """Initialise ``sae`` in place from a sample of the cache and return the first state."""
    scale = cache.manifest.scale
    batch_size = min(sample, cache.n_split("train"))
    first = next(cache.batches(batch_size, split="train", seed=config.seed)).acts.to(sae.device) * scale
    sae.initialise(first, losses.geometric_median(first))
    sae.rescale_(1 / scale)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr or 0.0, eps=6.25e-10, fused=True)
    since = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    return TrainState(optimizer, since, scale, cache.manifest.variance * scale**2)


def train(
    sae: SAE, cache: ActivationCache, config: TrainConfig | None = None, state: TrainState | None = None
) -> Iterator[StepMetrics]:
    """Train ``sae`` in place on the training split of ``cache``; yields after every step.

    While the generator runs, the parameters are in units of the scaled data (see ``TrainState.scale``); when it
    ends or is closed they are folded back, so that ``sae`` takes raw activations. Pass the ``state`` of an earlier
    run to go on exactly where it stopped.
    """
    check(sae, cache, config := (config or TrainConfig()).resolved(sae, cache))
    state = state or start(sae, cache, config)
    sae.rescale_(state.scale)
    total = n_steps(cache, config)
    sae.train()
    try:
        for batch in _batches(cache, config, sae, state):
            yield _step(sae, batch, config, state, total)
        held_out = cache.batches(config.batch_size, split="held_out", seed=None)
        sae.calibrate(batch.acts.to(sae.device) * state.scale for batch in held_out)
    finally:
        sae.eval()
        sae.rescale_(1 / state.scale)


def check(sae: SAE, cache: ActivationCache, config: TrainConfig) -> None:
    """Refuse a run that cannot work, before anything is computed."""
    if cache.d_in != sae.d_in:
        raise UserError(f"the SAE reads width d_in={sae.d_in} but the cache holds width {cache.d_in}")
    if sae.needs_grads and not cache.has_grads:
        raise UserError(f"{sae.variant} needs gradients and the cache has none; harvest it with --gradients")
    if config.batch_size > cache.n_split("train"):
        raise UserError(
            f"batch_size={config.batch_size} exceeds the {cache.n_split('train')} training rows of the cache; "
            "lower it or harvest more tokens"
        )


def n_steps(cache: ActivationCache, config: TrainConfig) -> int:
    """Steps of a whole run."""
    return config.epochs * cache.n_batches(config.batch_size, split="train", drop_last=True)


def _batches(cache: ActivationCache, config: TrainConfig, sae: SAE, state: TrainState) -> Iterator[Batch]:
    per_epoch = cache.n_batches(config.batch_size, split="train", drop_last=True)
    first, start_at = divmod(state.step, per_epoch)
    for epoch in range(first, config.epochs):
        yield from cache.batches(
            config.batch_size,
            split="train",
            seed=config.seed,
            epoch=epoch,
            start=start_at if epoch == first else 0,
            grads=sae.needs_grads,
            drop_last=True,
        )


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step: linear warm-up, constant, then the chosen decay to zero."""
    lr = config.lr or 0.0
    warmup, decay = config.warmup * total, config.decay_share * total
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    left = (total - step) / decay if config.decay != "none" and decay > 0 else 1.0
    if left >= 1:
        return lr
    return lr * (left if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def _step(sae: SAE, batch: Batch, config: TrainConfig, state: TrainState, total: int) -> StepMetrics:
    x = batch.acts.to(sae.device) * state.scale
    # The loss does not change when its input is rescaled, so its gradient scales inversely.
    grads = None if batch.grads is None else batch.grads.to(sae.device) / state.scale
    n = x.shape[0]

    code = sae.encode(x, grads)
    objective, recon = sae.reconstruction_loss(x, code)
    error = x - recon
    sae.observe(x, code, grads)
    terms = {name: term / state.variance for name, term in sae.extra_losses(x, code, error).items()}

    # Firing statistics come before the auxiliary loss, which looks at what is dead now.
    state.tokens_since_fired += n
    state.tokens_since_fired[code.fired()] = 0
    dead = (state.tokens_since_fired > (config.dead_after or 0)).nonzero().flatten()
    for name, (weight, latents) in sae.aux_latents(dead, config.aux_weight).items():
        if weight and latents.numel() and isinstance(sae, LinearSAE):
            terms[name] = weight * losses.auxk(sae, x, error, latents, config.k_aux or 1)

    loss = objective / (n * state.variance) + sum(terms.values())
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()

    sae.normalise_decoder()
    sae.project_decoder_grad()
    max_norm = config.grad_clip if config.grad_clip is not None else math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), max_norm)
    lr = learning_rate(config, state.step, total) * sae.lr_scale(state.step, total)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()

    state.step += 1
    state.tokens_seen += n
    sae.after_step(state.step, total)
    return StepMetrics(
        step=state.step,
        tokens=state.tokens_seen,
        loss=loss.item(),
        fvu=(error.square().sum() / (n * state.variance)).item(),
        l0=code.l0().double().mean().item(),
        dead=dead.numel(),
        lr=lr,
        grad_norm=grad_norm.item(),
        terms={name: term.item() for name, term in terms.items()},
        diagnostics=sae.diagnostics(),
    )

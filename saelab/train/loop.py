"""The training loop, as a generator: the command line prints, the notebook plots, the app draws, all over this."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saelab import losses
from saelab.data.cache import ActivationCache, Batch
from saelab.errors import UserError
from saelab.sae import SAE, LinearSAE
from saelab.train.config import TrainConfig, check, n_steps
from saelab.train.schedule import learning_rate, set_warmups
from saelab.train.state import TrainState, make_optimizer


class Diverged(UserError):
    """The loss or the gradient became NaN or infinite; the message names the step and what to change."""


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


def train(
    sae: SAE,
    cache: ActivationCache,
    config: TrainConfig | None = None,
    state: TrainState | None = None,
    stream: Iterable[Batch] | None = None,
) -> Generator[StepMetrics]:
    """Train ``sae`` in place on the training split of ``cache``; yields after every step.

    While the generator runs, the parameters are in units of the scaled data (see ``TrainState.scale``); when it
    ends or is closed they are folded back, so that ``sae`` takes raw activations. Pass the ``state`` of an earlier
    run to go on exactly where it stopped: weights, metrics and data order are then bit-identical to those of a run
    that was never interrupted, on the same machine with the same number of threads. ``stream`` hands in the batches
    that the run would read (a sweep reads them once for all its SAEs).
    """
    check(sae, cache, config := (config or TrainConfig()).resolved(sae, cache))
    state = state or start(sae, cache, config)
    total = n_steps(cache, config)
    state.unfold(sae)
    sae.train()
    try:
        for batch in stream or batches(cache, config, state.step, sae.needs_grads):
            yield step(sae, batch, config, state, total)
        finish(sae, cache, config, state)
    finally:
        sae.eval()
        state.fold(sae)


SAMPLE = 32_768  # activations that set data-dependent parameters (Gao et al., 2024)


def start(sae: SAE, cache: ActivationCache, config: TrainConfig, centre: Tensor | None = None) -> TrainState:
    """Initialise ``sae`` in place from a sample of the cache and return the first state.

    ``centre`` is the sample's geometric median (see :func:`centre_of`), where the caller has it already.
    """
    scale = cache.manifest.scale
    x = _sample(cache, config).to(sae.device)
    sae.initialise(x, losses.geometric_median(x) if centre is None else centre.to(sae.device))
    since = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    state = TrainState(make_optimizer(sae), since, scale, cache.manifest.variance * scale**2)
    state.fold(sae)
    return state


def centre_of(cache: ActivationCache, config: TrainConfig, device: torch.device) -> Tensor:
    """The geometric median of the sample that :func:`start` takes, in scaled units. ``[d_in]``"""
    return losses.geometric_median(_sample(cache, config).to(device))


def _sample(cache: ActivationCache, config: TrainConfig) -> Tensor:
    size = min(SAMPLE, cache.n_split("train"))
    return next(cache.batches(size, split="train", seed=config.data_seed)).acts * cache.manifest.scale


def batches(cache: ActivationCache, config: TrainConfig, step: int, grads: bool) -> Generator[Batch]:
    """The batches of a run from a given step on."""
    per_epoch = cache.n_batches(config.batch_size, split="train", drop_last=True)
    first, start_at = divmod(step, per_epoch)
    for epoch in range(first, config.epochs):
        yield from cache.batches(
            config.batch_size,
            split="train",
            seed=config.data_seed,
            epoch=epoch,
            start=start_at if epoch == first else 0,
            grads=grads,
            drop_last=True,
        )


def step(sae: SAE, batch: Batch, config: TrainConfig, state: TrainState, total: int) -> StepMetrics:
    """One step: forward, statistics, backward, constraint on the decoder, clip, average, Adam (in this order)."""
    x = batch.acts.to(sae.device) * state.scale
    # The loss does not change when its input is rescaled, so its gradient scales inversely.
    grads = None if batch.grads is None else batch.grads.to(sae.device) / state.scale
    set_warmups(sae, config, state.step, total)
    with _randomness(config.seed, state.step, sae.device), _autocast(config, sae.device):
        loss, parts, dead = _forward(sae, x, grads, config, state)

    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    sae.normalise_decoder()
    sae.project_decoder_grad()
    grad_norm = _clip(sae, config.grad_clip)

    # One transfer from the device for everything that is reported, before anything non-finite reaches the weights.
    named = {"loss": loss, "grad_norm": grad_norm, **parts}
    numbers = dict(zip(named, torch.stack([value.detach().double() for value in named.values()]).tolist()))
    if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
        raise Diverged(_diagnosis(state.step + 1, numbers, config))

    lr = learning_rate(config, state.step, total) * sae.lr_scale(state.step, total)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    _average(sae, config.ema, state)
    state.optimizer.step()

    state.step += 1
    state.tokens_seen += x.shape[0]
    with torch.no_grad():
        sae.after_step(state.step, total)
    main = {name: numbers.pop(name) for name in ("loss", "fvu", "l0", "grad_norm")}
    return StepMetrics(
        state.step, state.tokens_seen, **main, dead=dead, lr=lr, terms=numbers, diagnostics=sae.diagnostics()
    )


def _forward(
    sae: SAE, x: Tensor, grads: Tensor | None, config: TrainConfig, state: TrainState
) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, its reported parts (FVU, L0, weighted extra terms), and the number of dead latents."""
    n = x.shape[0]
    code = sae.encode(x, grads)
    objective, recon = sae.reconstruction_loss(x, code)
    error = x - recon
    with torch.no_grad():
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
    fvu = error.square().sum() / (n * state.variance)
    l0 = (code.values != 0).sum() / n
    return loss, {"fvu": fvu, "l0": l0, **terms}, dead.numel()


@torch.no_grad()
def finish(sae: SAE, cache: ActivationCache, config: TrainConfig, state: TrainState) -> None:
    """Turn the trained weights into those to keep: averaged if asked for, unit-norm decoder, thresholds set."""
    if state.ema and config.ema is not None:
        correction = 1 - config.ema**state.step
        for name, parameter in sae.named_parameters():
            parameter.copy_(state.ema[name] / correction)
    sae.normalise_decoder()
    sae.eval()
    split = "held_out" if cache.n_split("held_out") else "train"
    held_out = cache.batches(min(config.batch_size, cache.n_split(split)), split=split, seed=None)
    sae.calibrate(batch.acts.to(sae.device) * state.scale for batch in held_out)


def _clip(sae: SAE, max_norm: float | None) -> Tensor:
    """Scale the whole gradient down to ``max_norm``; returns its norm before that."""
    grads = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    # On a CPU looking at the norm is free and saves a pass over the gradient; on a GPU it would cost a wait.
    if max_norm is not None and (norm.is_cuda or norm > max_norm):
        torch.nn.utils.clip_grads_with_norm_(sae.parameters(), max_norm, norm)
    return norm


@torch.no_grad()
def _average(sae: SAE, decay: float | None, state: TrainState) -> None:
    """Add the weights to their moving average, before the optimizer moves them (Gao et al., 2024)."""
    if decay is None:
        return
    parameters = dict(sae.named_parameters())
    if not state.ema:
        state.ema = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    torch._foreach_lerp_([state.ema[name] for name in parameters], list(parameters.values()), 1 - decay)


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


@contextmanager
def _randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Make what is random inside a step a function of the seed and the step, and leave the caller's generator alone.

    So a resumed run and a member of a sweep draw the same numbers as a run of its own.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        # The CPU's generator looks at 32 bits only; a large odd factor keeps the seeds' step ranges apart.
        torch.manual_seed((seed * 0x9E3779B1 + step) % 2**32)
        yield


def _diagnosis(step: int, numbers: dict[str, float], config: TrainConfig) -> str:
    # The activations are not to blame: the cache refuses to hand out non-finite ones.
    what = "loss" if not math.isfinite(numbers["loss"]) else "gradient"
    values = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    return f"the {what} is not finite at step {step} ({values}); lower lr={config.lr:.2g} or set grad_clip"

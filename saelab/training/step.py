"""One training step, in one process or in one of many that share the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saelab import kernels
from saelab.data.cache import Batch
from saelab.devices import in_float64
from saelab.distributed import SINGLE, Parallel
from saelab.distributed.sharding import REPLICATED, auxk, represent
from saelab.losses import Subset
from saelab.sae import SAE, LinearSAE
from saelab.training.config import TrainConfig
from saelab.training.divergence import excess
from saelab.training.schedule import learning_rate
from saelab.training.state import TrainState


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


def train_step(
    sae: SAE, batch: Batch, config: TrainConfig, state: TrainState, total: int, parallel: Parallel = SINGLE
) -> StepMetrics:
    """One step: forward, statistics, backward, constraint on the decoder, clip, average, Adam (in this order)."""
    n = batch.acts.shape[0]
    x = parallel.share(batch.acts).to(sae.device) * state.scale
    # The loss does not change when its input is rescaled, so its gradient scales inversely.
    grads = None if batch.grads is None else parallel.share(batch.grads).to(sae.device) / state.scale
    sae.schedule(state.step, total)
    with _randomness(config.seed, state.step, sae.device), kernels.use_precision(config.precision):
        loss, parts, dead, subsets = _forward(sae, x, grads, n, config, state, parallel)

    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for subset in subsets:
        subset.add_gradients(sae)  # pyright: ignore[reportArgumentType]
    for parameter in sae.parameters():
        if parameter.grad is not None:
            parallel.sum_data(parameter.grad, "gradients")
    sae.normalise_decoder()
    sae.project_decoder_grad()
    grad_norm = _clip(sae, config.grad_clip, parallel)

    # One transfer from the device for everything that is reported, before anything non-finite reaches the weights.
    numbers = _report({"loss": loss, **parts}, parallel) | {"grad_norm": grad_norm.item()}
    energy = numbers.pop("energy")
    if state.step == 0:
        state.first_fvu = numbers["fvu"]
    state.excess = excess(state.step + 1, numbers, energy, state.first_fvu, config)

    lr = learning_rate(config, state.step, total) * sae.lr_scale(state.step, total)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    _average(sae, config.ema, state)
    state.optimizer.step()

    state.step += 1
    state.tokens_seen += n
    with torch.no_grad():
        sae.after_step(state.step, total)
    main = {name: numbers.pop(name) for name in ("loss", "fvu", "l0", "grad_norm")}
    return StepMetrics(
        state.step, state.tokens_seen, **main, dead=dead, lr=lr, terms=numbers, diagnostics=sae.diagnostics()
    )


def _forward(
    sae: SAE,
    x: Tensor,
    grads: Tensor | None,
    n: int,
    config: TrainConfig,
    state: TrainState,
    parallel: Parallel,
) -> tuple[Tensor, dict[str, Tensor], int, list[Subset]]:
    """The loss, its reported parts (FVU, L0, weighted extra terms), the number of dead latents, and AuxK rows.

    ``n`` is the size of the whole batch, of which ``x`` is this data rank's share; the shares' losses add up.
    """
    code, objective, recon = represent(sae, x, grads, parallel)
    error = x - recon
    with torch.no_grad():
        sae.observe(x, code, grads)
        _share_statistics(sae, parallel)
    per_token = state.variance * parallel.data_size
    terms = {name: term / per_token for name, term in sae.extra_losses(x, code, error).items()}

    # Firing statistics come before the auxiliary loss, which looks at what is dead now.
    state.tokens_since_fired += n
    state.tokens_since_fired[parallel.any_data(code.fired())] = 0
    dead = (state.tokens_since_fired > (config.dead_after or 0)).nonzero().flatten()
    subsets = []
    for name, (weight, latents) in sae.aux_latents(dead, config.aux_weight).items():
        n_latents = _count(latents, parallel)
        if weight and n_latents:
            assert isinstance(sae, LinearSAE)  # others are refused before the run begins
            subsets.append(Subset.copied(sae, latents))
            terms[name] = weight * auxk(sae, x, error, subsets[-1], config.k_aux or 1, n_latents, parallel)

    loss = objective / (n * state.variance) + sum(terms.values())
    fvu = error.square().sum() / (n * state.variance)
    # All dictionary ranks compute the same loss, but each counts its own latents.
    l0 = (code.values != 0).sum() / n * parallel.dict_size
    energy = x.square().sum() / (n * state.variance)
    return loss, {"fvu": fvu, "l0": l0, "energy": energy, **terms}, _count(dead, parallel), subsets


def _report(values: dict[str, Tensor], parallel: Parallel) -> dict[str, float]:
    stacked = torch.stack([in_float64(value.detach()) for value in values.values()]) / parallel.dict_size
    return dict(zip(values, parallel.sum_all(stacked, "statistics").tolist()))


def _count(latents: Tensor, parallel: Parallel) -> int:
    """How many latents all dictionary ranks have together."""
    if parallel.dict_size == 1:
        return latents.numel()
    return int(parallel.sum_dict(torch.tensor([latents.numel()], device=latents.device), "statistics"))


def _share_statistics(sae: SAE, parallel: Parallel) -> None:
    """Average the statistics that the variant has collected on each data rank, so that all ranks hold the same."""
    if parallel.data_size > 1:
        for buffer in sae.buffers():
            if buffer.is_floating_point():
                buffer.copy_(parallel.sum_data(buffer.clone(), "statistics") / parallel.data_size)


def _clip(sae: SAE, max_norm: float | None, parallel: Parallel) -> Tensor:
    """Scale the whole gradient down to ``max_norm``; returns its norm before that."""
    named = {name: parameter.grad for name, parameter in sae.named_parameters() if parameter.grad is not None}
    if parallel.dict_size == 1:
        norm = torch.nn.utils.get_total_norm(named.values())
    else:
        shared = [grad for name, grad in named.items() if name in REPLICATED]
        own = torch.nn.utils.get_total_norm([grad for name, grad in named.items() if name not in REPLICATED])
        squares = parallel.sum_dict(own.square()[None], "statistics")[0]
        norm = (squares + torch.nn.utils.get_total_norm(shared).square()).sqrt()
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


@contextmanager
def _randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Make the random numbers of a step a function of seed and step; the caller's generator is not touched.

    So a resumed run and a member of a sweep draw the same numbers as a single uninterrupted run.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        # The CPU's generator looks at 32 bits only; a large odd factor keeps the seeds' step ranges apart.
        torch.manual_seed((seed * 0x9E3779B1 + step) % 2**32)
        yield

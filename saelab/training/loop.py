"""The training loop, as a generator: its caller may print, plot or stop after every step."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import losses
from saelab.data.cache import ActivationCache, Batch
from saelab.distributed import SINGLE, Parallel
from saelab.distributed.failures import is_lost
from saelab.distributed.sharding import share_of
from saelab.distributed.sharding import whole as whole_of
from saelab.errors import UserError
from saelab.sae import SAE, LinearSAE
from saelab.training.config import TrainConfig, n_steps, prepared
from saelab.training.memory import check_memory
from saelab.training.readings import StepMetrics
from saelab.training.state import TrainState, make_optimizer
from saelab.training.step import train_step


def train_steps(
    sae: SAE,
    cache: ActivationCache,
    config: TrainConfig | None = None,
    state: TrainState | None = None,
    stream: Iterable[Batch] | None = None,
    parallel: Parallel = SINGLE,
) -> Generator[StepMetrics]:
    """Train ``sae`` in place on the training split of ``cache``, one step each time the generator is advanced.

    A run that cannot work raises UserError at once; nothing is computed before the first ``next()``. While the
    generator runs, the parameters are in units of the scaled data (see ``TrainState.scale``); when it ends or is closed
    they are folded back, so that ``sae`` takes raw activations. Pass the ``state`` of an earlier run to continue
    exactly where it stopped: weights, metrics and data order are then bit-identical to those of a run that was never
    interrupted, on the same machine with the same number of threads. ``stream`` supplies the batches that the run would
    read (a sweep reads them once for all its SAEs). ``parallel`` is this process's place among many that run the same
    generator; ``sae`` is then this process's shard and ``config`` that of the whole SAE. :func:`saelab.training.train`
    runs it to the end.
    """
    config = prepared(whole_of(sae, parallel), cache, config, parallel).on(sae.device)
    return run_steps(sae, cache, config, state, stream, parallel)


def run_steps(
    sae: SAE,
    cache: ActivationCache,
    config: TrainConfig,
    state: TrainState | None,
    stream: Iterable[Batch] | None,
    parallel: Parallel,
) -> Generator[StepMetrics]:
    """The steps of :func:`train_steps`, for a configuration that is prepared already."""
    if state is None:
        check_memory(sae, config, data_ranks=parallel.data_size)
        state = start(sae, cache, config)
    total = n_steps(cache, config)
    state.keep_moments_in(config.moments)
    state.divide(sae, parallel)
    state.unfold(sae)
    sae.train()
    alone, sae.share = sae.share, share_of(parallel)
    try:
        own = (parallel.data_rank, parallel.data_size)
        if stream is None:
            stream = batches(cache, config, state.step, sae.needs_grads, sae.device, own)
        for batch in stream:
            yield train_step(sae, batch, config, state, total, parallel)
        if state.step < total:
            raise UserError(f"the stream ended after step {state.step} of {total}; supply every batch of the run")
        if state.readings is not None:
            state.readings.read()  # a run that diverged has no final weights
        finalise(sae, cache, config, state)
    except GeneratorExit:  # on all processes, at the same step
        if not is_lost():
            state.join()
        raise
    finally:
        sae.share = alone
        sae.eval()
        state.fold(sae)


RUN = 128  # neighbouring rows taken together from as many places as make up SAMPLE
SAMPLE = 32_768  # activations that set data-dependent parameters (Gao et al., 2024)


def start(sae: SAE, cache: ActivationCache, config: TrainConfig, centre: Tensor | None = None) -> TrainState:
    """Initialise ``sae`` in place from a sample of the cache and return the first state.

    ``centre [d_in]`` is the sample's geometric median (see :func:`centre_of`), where the caller has it already.
    """
    sample = _sample(cache)
    x = sample.acts.to(sae.device) * cache.manifest.scale
    goal = x if sample.target is None else sample.target.to(sae.device) * cache.goal.manifest.scale
    sae.initialise(x, losses.geometric_median(goal) if centre is None else centre.to(sae.device))
    if sample.target is not None and isinstance(sae, LinearSAE):
        sae.initialise_map(x, goal)
    state = _first_state(sae, cache)
    state.fold(sae)
    return state


def adopt(sae: SAE, cache: ActivationCache) -> TrainState:
    """The first state of a fine-tuning run, which continues from the trained ``sae`` in raw units.

    The reconstructions do not change. Where the variant allows, the norms of dictionary rows move into the encoder,
    because training keeps the rows at unit norm.
    """
    sae.before_fine_tuning(cache.goal.manifest.scale)
    if isinstance(sae, LinearSAE) and sae.transcodes:
        sae.centre_on(torch.tensor(cache.manifest.mean).to(sae.W_dec))
    return _first_state(sae, cache)


def _first_state(sae: SAE, cache: ActivationCache) -> TrainState:
    scale, goal = cache.manifest.scale, cache.goal.manifest
    since = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    of_target = None if cache.target is None else goal.scale
    return TrainState(make_optimizer(sae), since, scale, goal.variance * goal.scale**2, target_scale=of_target)


def centre_of(cache: ActivationCache, config: TrainConfig, device: torch.device) -> Tensor:
    """The geometric median of the sample that :func:`start` takes, of the target if there is one, in scaled units."""
    sample = _sample(cache)
    goal = sample.acts if sample.target is None else sample.target
    return losses.geometric_median(goal.to(device) * cache.goal.manifest.scale)


def sample_of(cache: ActivationCache) -> Float[Tensor, "n d_in"]:
    """Training rows, in scaled units: runs of neighbours at equal distances over the split, which is quick to read.

    Rows from a part of the text would give thresholds with another L0 on the rest.
    """
    return _sample(cache).acts * cache.manifest.scale


def _sample(cache: ActivationCache) -> Batch:
    first, stop = cache.sample_rows
    n = stop - first
    runs, length = (SAMPLE // RUN, RUN) if n > SAMPLE else (1, n)
    starts = first + torch.arange(runs) * (n - length) // max(runs - 1, 1)
    return cache.read((starts[:, None] + torch.arange(length)).flatten())


def batches(
    cache: ActivationCache,
    config: TrainConfig,
    step: int,
    grads: bool,
    device: torch.device | str | None = None,
    part: tuple[int, int] = (0, 1),
) -> Generator[Batch]:
    """The batches of a run from a given step on; on ``device``, or on the CPU.

    With ``part=(i, n)`` only the rows of the i-th of n data ranks are read.
    """
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
            device=device,
            part=part,
        )


@torch.no_grad()
def finalise(sae: SAE, cache: ActivationCache, config: TrainConfig, state: TrainState) -> None:
    """Turn the trained weights into the final ones: averaged if configured, unit-norm decoder, thresholds set."""
    sae.schedule(state.step, n_steps(cache, config))
    if state.ema and config.ema is not None:
        correction = 1 - config.ema**state.step
        for name, parameter in sae.named_parameters():
            parameter.copy_(state.ema[name] / correction)
    state.join()
    if isinstance(sae, LinearSAE) and sae.transcodes:
        sae.uncentre()
    sae.normalise_decoder()
    sae.eval()
    # On training rows: thresholds fitted to the held-out ones would meet their target there by construction.
    sae.calibrate([sample_of(cache).to(sae.device)])

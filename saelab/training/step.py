"""One training step, in one process or in one of many that share the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saelab import kernels
from saelab.data.cache import Batch
from saelab.distributed import SINGLE, Parallel
from saelab.distributed.sharding import auxk, represent
from saelab.kernels import tally
from saelab.sae import SAE, LinearSAE
from saelab.training import dead
from saelab.training.config import TrainConfig
from saelab.training.constraint import (
    clip_factor,
    constrain,
    constrains_on_the_way,
    gradient_norm,
    squared_gradients,
    unmeasured,
)
from saelab.training.divergence import LIMIT, excess
from saelab.training.readings import Numbers, Readings, StepMetrics, together
from saelab.training.schedule import learning_rate
from saelab.training.state import TrainState


def train_step(
    sae: SAE, batch: Batch, config: TrainConfig, state: TrainState, total: int, parallel: Parallel = SINGLE
) -> StepMetrics:
    """One step: forward, statistics, backward, constraint on the decoder, clip, average, Adam (in this order).

    ``batch`` has the rows of this data rank.
    """
    n, later = batch.acts.shape[0] * parallel.data_size, leaves_numbers(sae.device, parallel)
    x, grads, target = _scaled(batch, state, sae.device)
    sae.schedule(state.step, total)
    measures = config.freeze == "none" and constrains_on_the_way(sae, parallel)
    sums = kernels.RowSums() if measures else None
    with _randomness(config.seed, state.step, sae.device), kernels.use_precision(config.precision):
        forward = partial(_forward, sae, x, grads, target, n, config, state, parallel, later, sums)
        done = forward() if state.engine is None else state.engine(forward)

    state.optimizer.zero_grad(set_to_none=True)
    done.loss.backward()
    copies = [aux.rows for aux in done.auxiliary.values()]
    if state.engine is not None:
        state.engine.deliver()
        copies = []  # the rows were no copies, so their gradient is there already
    scale = constrain(sae, copies, sums)

    for name in FROZEN[config.freeze]:
        getattr(sae, name).grad = None  # neither the norm nor the optimizer sees it

    # What is not finite must not reach the weights: on a CPU it is looked at now, on a GPU a flag forbids the update.
    readings = state.readings = state.readings or Readings(lambda step, raw: digest(step, raw, state, config))
    numbers, factor, skip, found = _numbers(
        sae, x if target is None else target, done, config, state, parallel, later, sums
    )

    lr = learning_rate(config, state.step, total) * sae.lr_scale(state.step, total)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    _average(sae, config.ema, state)
    state.optimizer.update(factor, skip, scale)

    state.step += 1
    state.tokens_seen += n
    with torch.no_grad():
        sae.after_step(state.step, total)
    diagnostics = sae.diagnostics()
    metrics = StepMetrics(state.step, state.tokens_seen, lr, readings.of)
    if found is None:
        readings.add(metrics, numbers | {f"={name}": value for name, value in diagnostics.items()})
    else:
        known = {name: value.item() if isinstance(value, Tensor) else value for name, value in diagnostics.items()}
        metrics.settle(found._replace(diagnostics=known))
    return metrics


def _scaled(batch: Batch, state: TrainState, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The activations, gradients and target of a batch on the device, in units of the scaled data."""
    x, grads, target = (
        None if t is None else t.to(device, non_blocking=True) for t in (batch.acts, batch.grads, batch.target)
    )
    assert x is not None
    if grads is not None:
        # The loss does not change when what it depends on is rescaled, so its gradient scales inversely.
        grads = grads / state.out_scale
    return x * state.scale, grads, None if target is None else target * state.out_scale


FROZEN: dict[str, tuple[str, ...]] = {"none": (), "decoder": ("W_dec",), "encoder": ("W_enc",)}


class Forward(NamedTuple):
    """What the forward pass leaves for the rest of the step."""

    loss: Tensor
    parts: dict[str, Tensor]  # what is reported besides: FVU, L0 and energy, unless ``fired`` is there, and loss terms
    auxiliary: dict[str, dead.Aux]
    fired: tally.Fired | None  # where the numbers of the step are made by two kernels


def _forward(
    sae: SAE,
    x: Tensor,
    grads: Tensor | None,
    target: Tensor | None,
    n: int,
    config: TrainConfig,
    state: TrainState,
    parallel: Parallel,
    later: bool,
    sums: kernels.RowSums | None,
) -> Forward:
    """The loss with all that is reported of it, and the auxiliary losses with their rows.

    ``n`` is the size of the whole batch, of which ``x`` is this data rank's share; the shares' losses add up.
    """
    wanted = sae.to_decode(x, target)
    code, objective, recon = represent(sae, x, grads, parallel, sums, None if target is None else wanted)
    with torch.no_grad():
        sae.observe(x, code, grads)
        _share_statistics(sae, parallel)
    # Firing statistics come before the auxiliary loss, which looks at what is dead now.
    fired, limit, since = None, config.dead_limit, state.tokens_since_fired
    if later and sums is not None and sums.errors is not None and code.by is not None:
        fired = tally.count_fired(code.values, code.by, since, n, limit)
    if fired is None:
        dead.mark_fired(state, parallel.any_data(code.fired()), n)
    auxiliary = dead.auxiliary(sae, state, config, n, later)

    error = None
    if fired is None or auxiliary or type(sae).extra_losses is not SAE.extra_losses:
        error = wanted.detach() - recon
    per_token = state.variance * parallel.data_size
    extra = {} if error is None else sae.extra_losses(x, code, error)
    terms = {name: term / per_token for name, term in extra.items()}
    for name, aux in list(auxiliary.items()):
        n_latents = _count(aux.rows.latents, parallel)
        if not n_latents:
            del auxiliary[name]
            continue
        assert isinstance(sae, LinearSAE) and error is not None
        through = config.aux_gradient == "straight_through"
        loss = auxk(sae, x, error, aux.rows, config.aux_count, through, n_latents, parallel)
        terms[name] = aux.weight * loss

    loss = objective / (n * state.variance)
    if terms:
        loss = loss + sum(terms.values())
    if fired is not None or error is None:
        return Forward(loss, terms, auxiliary, fired)
    fvu = error.square().sum() / (n * state.variance)
    # All dictionary ranks compute the same loss, but each counts its own latents.
    l0 = (code.values != 0).sum() / n * parallel.dict_size
    energy = (x if target is None else target).square().sum() / (n * state.variance)
    return Forward(loss, {"fvu": fvu, "l0": l0, "energy": energy, **terms}, auxiliary, None)


@torch.no_grad()
def _numbers(
    sae: SAE,
    goal: Tensor,
    done: Forward,
    config: TrainConfig,
    state: TrainState,
    parallel: Parallel,
    later: bool,
    sums: kernels.RowSums | None,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None, Numbers | None]:
    """All numbers by name; the factor that clips; the flag that forbids the update; and what was read, unless later.

    ``goal`` is what is reconstructed.
    """
    counts = {f"{name}#": aux.taking_part for name, aux in done.auxiliary.items() if aux.taking_part is not None}
    parts = done.parts
    if done.fired is not None and sums is not None and sums.errors is not None:
        length = torch.linalg.vector_norm(goal)
        rest = unmeasured(sae, sums)
        if sums.squares is not None and rest:
            first, failed = references(state, goal.device)
            found = tally.report(
                sums.errors.detach(), done.fired, sums.squares,
                rest[0] if len(rest) == 1 else torch.cat([grad.flatten() for grad in rest]), length,
                torch.stack([term.detach().float() for term in parts.values()]) if parts else None, first, failed,
                variance=state.variance, most=config.grad_clip, limit=LIMIT, starting=state.step == 0,
            )  # fmt: skip
            numbers = dict(zip(tally.NAMES, found.numbers.unbind())) | parts | counts
            return numbers, found.factor if config.grad_clip else None, failed, None
        unit = goal.shape[0] * state.variance
        fvu, l0 = sums.errors.sum() / unit, done.fired.counts.sum() / goal.shape[0]
        parts = {"fvu": fvu, "l0": l0, "energy": length.square() / unit, **parts}
    if parallel.size == 1:
        shared = dict(zip(("loss", *parts), together({"loss": done.loss, **parts}).unbind()))
        shared["dead"], grad_norm = dead.number(state, config), gradient_norm(sae, sums)
    else:
        shared, grad_norm = _summed({"loss": done.loss, **parts}, sae, state, config, parallel)
    numbers = {**shared, "grad_norm": grad_norm, **counts}
    factor = clip_factor(grad_norm, config.grad_clip, later)
    if later:
        return numbers, factor, flag_failure(state, numbers), None
    if parallel.size == 1:
        read = {name: value.item() for name, value in numbers.items()}
    else:  # a GPU is waited for once
        read = dict(zip(numbers, together(numbers).tolist()))
    return numbers, factor, None, digest(state.step + 1, read, state, config)


def _summed(
    parts: dict[str, Tensor], sae: SAE, state: TrainState, config: TrainConfig, parallel: Parallel
) -> tuple[dict[str, Tensor], Tensor]:
    """The numbers of the whole step and the norm of its gradient, from those of all processes in one exchange."""
    # All dictionary ranks compute the same losses and the same gradients of what they share.
    own = together({**parts, "shared": squared_gradients(sae, shared=True)}) / parallel.dict_size
    squares, silent = squared_gradients(sae, shared=False), dead.number(state, config) / parallel.data_size
    total = parallel.sum_all(torch.cat([own, together({"own": squares, "dead": silent})]), "statistics")
    found = dict(zip((*parts, "shared", "own", "dead"), total.unbind()))
    norm = (found.pop("shared") + found.pop("own")).sqrt().float()
    return found, norm


def leaves_numbers(device: torch.device, parallel: Parallel) -> bool:
    """Whether a step leaves its numbers on the device: on a GPU, unless other processes wait for some of them."""
    return device.type == "cuda" and parallel.size == 1


def references(state: TrainState, device: torch.device) -> tuple[Tensor, Tensor]:
    """The FVU of the first batch, and the flag that a step has failed, on the device."""
    if state.first is None or state.failed is None:
        state.first = torch.full((), state.first_fvu, dtype=torch.float64, device=device)
        state.failed = torch.zeros((), dtype=torch.float32, device=device)
    return state.first, state.failed


def flag_failure(state: TrainState, numbers: Mapping[str, Tensor]) -> Tensor:
    """1 from the first step on whose numbers :func:`saelab.training.divergence.excess` refuses; on the device."""
    fvu = numbers["fvu"]
    first, failed = references(state, fvu.device)
    if state.step == 0:
        first.copy_(fvu)
    least = torch.maximum(numbers["energy"], first).clamp_min(1.0)
    good = (numbers["loss"] + numbers["grad_norm"]).isfinite() & (fvu / least <= LIMIT)
    return failed.masked_fill_(~good, 1.0)


def digest(step: int, raw: Mapping[str, float], state: TrainState, config: TrainConfig) -> Numbers:
    """The numbers of a step as they are reported; raises :class:`saelab.training.Diverged` for those of a failure."""
    main = ("loss", "fvu", "l0", "grad_norm")
    terms = {name: value for name, value in raw.items() if name not in (*main, "energy", "dead") and name[0] != "="}
    counts = {name: terms.pop(name) for name in list(terms) if name.endswith("#")}
    terms = {name: value for name, value in terms.items() if counts.get(f"{name}#", 1)}
    if step == 1:
        state.first_fvu = raw["fvu"]
    checked = {name: raw[name] for name in ("loss", "fvu", "l0")} | terms | {"grad_norm": raw["grad_norm"]}
    state.excess = excess(step, checked, raw["energy"], state.first_fvu, config)
    diagnostics = {name[1:]: value for name, value in raw.items() if name[0] == "="}
    return Numbers(**{name: raw[name] for name in main}, dead=int(raw["dead"]), terms=terms, diagnostics=diagnostics)


def _count(latents: Tensor, parallel: Parallel) -> int:
    """How many latents all dictionary ranks have together."""
    if parallel.dict_size == 1:
        return latents.numel()
    return int(parallel.sum_dict(torch.tensor([latents.numel()], device=latents.device), "statistics"))


def _share_statistics(sae: SAE, parallel: Parallel) -> None:
    """Average the statistics that the variant has collected on each data rank, so that all ranks hold the same."""
    if parallel.data_size > 1:
        for module in sae.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point():
                    mean = parallel.sum_data(buffer.clone(), "statistics") / parallel.data_size
                    if not torch.equal(mean, buffer):  # replaced, as the backward pass may need it as it was
                        setattr(module, name, mean)


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
        number = (seed * 0x9E3779B1 + step) % 2**32
        if devices:
            torch.manual_seed(number)
        else:
            # The other function formats the stack, half a millisecond, for devices that may be used later.
            torch.default_generator.manual_seed(number)
        yield

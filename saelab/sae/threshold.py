"""Thresholds that replace a batch's budget at inference, so that a token's code does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab import kernels
from saelab.devices import widest_float
from saelab.kernels import SelectedPreActs
from saelab.sae.budget import BudgetSAE
from saelab.sae.linear import LinearSAE
from saelab.sae.share import spend
from saelab.sparse import SparseCode

SAMPLE_NUMBERS = 2**27  # activations kept for a calibration: 512 MiB in float32
CHUNK = 4096  # tokens whose pre-activations are looked at together


class RunningMean(nn.Module):
    """Exponential mean of a number or a vector, unbiased from the first update on; 0 before it.

    Always kept in float64 (float32 on a device without it): with a rate of 0.01, bfloat16 would round small updates
    away.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, *shape: int, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def update(self, value: Tensor, rate: float | None = None, where: Tensor | None = None) -> None:
        """Mix in ``value``, for the elements marked in ``where`` only."""
        rate = self.rate if rate is None else rate
        step = rate if where is None else rate * where.to(self.total)
        self.total += step * (value.to(self.total) - self.total)
        self.weight += step * (1 - self.weight)

    @torch.no_grad()
    def set_(self, value: Tensor) -> None:
        """Replace the history by one value."""
        self.total.copy_(value)
        self.weight.fill_(1.0)

    def mean(self) -> Tensor:
        return torch.where(self.weight > 0, self.total / self.weight, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMean:
        # Move to another device with the model, but keep the precision.
        device = fn(torch.empty(0, device=self.total.device)).device
        dtype = widest_float(device)
        self.total, self.weight = self.total.to(device, dtype), self.weight.to(device, dtype)
        return self


class BatchBudgetSAE(BudgetSAE):
    """Selects ``n * k`` latents over a batch in training; in eval mode one threshold decides.

    The threshold follows the smallest magnitude kept in each training batch and is set, when training ends, to the
    value at which a sample of training tokens has ``k`` active latents on average. Signed SAEs compare magnitudes.
    """

    saelens = "jumprelu"
    scaled = (*BudgetSAE.scaled, "threshold.total")

    def __init__(self, d_in: int, d_sae: int, k: int | float = 32, signed: bool = False, **options: Any) -> None:
        """
        Args:
            k: Latents per token, on average over the batch.
            signed: Keep the largest magnitudes with their sign.
        """
        super().__init__(d_in, d_sae, k, **options)
        self.signed = signed
        if signed:
            self.saelens = None  # SAELens has no two-sided threshold
            self.rate_factor = 1 / 3  # higher rates are unstable (docs/learning-rate.md)
        self.threshold = RunningMean()
        self.part, self.gather = 0, _undivided

    @property
    def budget_over(self) -> Literal["token", "batch", "latent"] | None:
        return "batch"

    def join(self, part: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.part, self.gather = part, gather

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        if self.training:
            budget = int(self.budget * (x.shape[0] * self.share.parts))
            operands = x, self.W_enc, self.b_enc, self.b_in
            return spend(
                lambda m: kernels.select_batch(*operands, m, self.signed), x.shape[0], self.d_sae, budget, self.share
            )
        return self.select_above(x, self.threshold.mean())

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        kept = code.values.detach().abs()
        least = torch.where(kept > 0, kept, torch.inf).amin() if kept.numel() else kept.new_tensor(torch.inf)
        least = self.share.least(self.gather(least).amin())
        known = least.isfinite()  # a mask in place of a branch, for which a GPU would have to be waited for
        self.threshold.update(torch.where(known, least, 0.0), where=known)

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        x = calibration_sample(batches, self.d_in)
        if x is not None:
            self.threshold.set_(global_threshold(self, x, self.k))

    def inference_threshold(self) -> Tensor | None:
        return self.threshold.mean()

    def diagnostics(self) -> dict[str, float | Tensor]:
        return {"threshold": self.threshold.mean()}


def _undivided(tensor: Tensor) -> Tensor:
    return tensor[None]


def calibration_sample(batches: Iterable[Tensor], d_in: int) -> Float[Tensor, "n d_in"] | None:
    """The first activations of ``batches``, as many as fit ``SAMPLE_NUMBERS``; none if there are none."""
    room, kept = SAMPLE_NUMBERS // d_in, []
    for batch in batches:
        kept.append(batch[:room])
        room -= kept[-1].shape[0]
        if not room:
            break
    return torch.cat(kept) if kept else None


@torch.no_grad()
def global_threshold(sae: BatchBudgetSAE, x: Float[Tensor, "n d_in"], k: int | float) -> Tensor:
    """The threshold above which the tokens ``x`` have ``k`` pre-activations each on average (magnitudes if signed).

    It is 0 when fewer than that are positive.
    """
    wanted, factor = int(k * x.shape[0]), 4
    while True:
        kept, floors = [], [x.new_tensor(-torch.inf)]
        for chunk in x.split(CHUNK):
            budget = min(int(factor * k * chunk.shape[0]), chunk.shape[0] * sae.d_sae)
            values = kernels.select_batch(chunk, sae.W_enc, sae.b_enc, sae.b_in, budget, sae.signed).values.abs()
            kept.append(values)
            if budget < chunk.shape[0] * sae.d_sae:
                floors.append(values.min())
        values = torch.cat(kept)
        largest = sae.gather(values.topk(min(wanted + 1, values.numel())).values).flatten()
        largest = largest.topk(min(wanted + 1, largest.numel())).values
        # Halfway between two entries: another order of summation must not push one across.
        threshold = largest[-2:].mean() if largest.numel() > wanted else largest.new_zeros(())
        # A chunk that keeps nothing below the threshold may have lost entries above it: look deeper.
        if sae.gather(torch.stack(floors).amax()).amax() <= threshold:
            return threshold
        factor *= 2


@torch.no_grad()
def latent_thresholds(
    sae: LinearSAE, x: Float[Tensor, "n d_in"], rates: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """Per latent the threshold above which it is active on a share ``rates`` of the tokens ``x``; never negative.

    A latent whose rate is less than half a token of the sample gets a value just above its largest there.
    """
    n = x.shape[0]
    wanted = (rates * n).round().long().clamp(0, n)
    thresholds = []
    width = max(1, SAMPLE_NUMBERS // n)
    for start in range(0, sae.d_sae, width):
        latents = slice(start, start + width)
        acts = sae.pre_acts(x, latents)
        acts = (acts.abs() if sae.signed else acts.relu()).sort(dim=0, descending=True).values
        bounds = torch.cat([acts[:1] * 1.001, acts, acts.new_zeros(1, acts.shape[1])])
        least, next_ = bounds.gather(0, torch.stack([wanted[latents], wanted[latents] + 1]))
        # Halfway between two entries, as above; where all that is positive is wanted, it is zero.
        thresholds.append(torch.where(next_ > 0, (least + next_) / 2, 0.0))
    return torch.cat(thresholds)

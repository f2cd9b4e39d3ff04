"""A controller of the sparsity penalty's coefficient, so that training ends at a requested L0.

The L0 that a coefficient leads to depends on the data, the width and the learning rate. In a run of T steps, with the
L0 of the last training batch and natural logarithms, each step does

    e = clip(log(L0 / wanted), -CLIP, CLIP)     error
    s = s + a (e - s)                           smoothed error, a = min(1, 1 / (SMOOTHING T))
    i = i + GAIN / T * s                        its integral
    coefficient = configured * exp(i + s)

``wanted`` falls geometrically from the first batch's L0 to the requested one during the penalty's warm-up, which avoids
an overshoot. All times are shares of the run, so that short runs settle too. The error is clipped because Adam limits
the speed of the weights whatever the coefficient: without a bound the integral would grow while L0 is on its way, and
L0 would fall far below the requested value.

This is a textbook proportional-integral controller with a bounded error against windup (Astrom and Hagglund, 1995, "PID
Controllers"), applied to logarithms. The constants were chosen on planted dictionaries (``python -m saelab.bench.l0``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.errors import UserError

CLIP = 0.5
SMOOTHING = 0.005
GAIN = 10.0
LEAST = 1e-3  # an empty batch counts as this share of the requested L0
BLOCK = 2**24  # pre-activations per chunk of the final shift
FAR = 1.25  # ratio of trained and requested L0 above which the final shift is reported
NEAR = 0.05  # relative error below which an L0 counts as reached


class L0Controller(nn.Module):
    """State of the controller, float64; ``factor()`` is what the configured coefficient is multiplied by.

    :meth:`observe` only records a batch's L0, because processes that share a batch average the buffers after it;
    :meth:`update` then computes the same on all of them.

    Attributes:
        trained: L0 on a sample of training tokens after the last step; 0 until then.
        reached: L0 on the same tokens after the final shift; 0 until then.
    """

    seen: Tensor
    first: Tensor
    error: Tensor
    integral: Tensor
    trained: Tensor
    reached: Tensor

    def __init__(self, l0: int | float, d_sae: int, start: float = 1.0) -> None:
        """``l0`` is the requested number of active latents per token, ``start`` the factor at the first step."""
        super().__init__()
        if not 0 < l0 <= d_sae:
            raise UserError(f"l0={l0} is not above 0 and at most d_sae={d_sae}; lower l0 or widen the SAE")
        self.l0 = l0
        for name in ("seen", "first", "error", "trained", "reached"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("integral", torch.tensor(math.log(start), dtype=torch.float64))

    def observe(self, l0: Tensor) -> None:
        """Note the L0 of a training batch, or of this process' share of it."""
        self.seen.copy_(l0)

    @torch.no_grad()
    def update(self, step: int, n_steps: int, share: float) -> None:
        """Follow step number ``step`` of ``n_steps``; the wanted L0 falls during a ``share`` of them."""
        seen, goal = self.seen.clamp_min(LEAST * self.l0).log(), math.log(self.l0)
        if step == 1:
            self.first.copy_(seen)
        left = max(0.0, 1 - step / (share * n_steps)) if share else 0.0
        error = (seen - goal - left * (self.first - goal)).clamp(-CLIP, CLIP)
        self.error += min(1.0, 1 / (SMOOTHING * n_steps)) * (error - self.error)
        self.integral += GAIN / n_steps * self.error

    def factor(self) -> Tensor:
        """The current factor on the configured coefficient."""
        return (self.integral + self.error).exp()

    def restart(self) -> None:
        """Begin a fine-tuning, from the coefficient that was reached."""
        for buffer in (self.seen, self.first, self.error, self.trained, self.reached):
            buffer.zero_()

    def remarks(self) -> list[str]:
        """One sentence if the trained SAE misses the requested L0, or needed a large shift to have it."""
        trained, reached = self.trained.item(), self.reached.item()
        if not trained and not reached:  # not calibrated yet
            return []
        if abs(reached / self.l0 - 1) > NEAR:
            return [f"l0={self.l0:g} was not reached, the nearest is {reached:.3g}; ask for that, or widen the SAE"]
        if not 1 / FAR < trained / self.l0 < FAR:
            return [
                f"training ended at L0 {trained:.3g} and thresholds were shifted to l0={self.l0:g}, which costs "
                "reconstruction; train longer, or raise lr"
            ]
        return []

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Fine-tuning may request an L0 for an SAE that was trained without one.
        for name, buffer in self.named_buffers():
            state_dict.setdefault(prefix + name, buffer.clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Shift(NamedTuple):
    """``cut`` is what scores must exceed, ``before`` the L0 with a cut of 0, ``after`` the L0 with this one."""

    cut: float
    before: float
    after: float


@torch.no_grad()
def shift_to(
    l0: int | float, x: Float[Tensor, "n d_in"], d_sae: int, scores: Callable[[Tensor], Float[Tensor, " m"]]
) -> Shift:
    """The cut that exactly ``l0`` scores per token of ``x`` exceed; if there are fewer scores, a cut below all of them.

    ``scores`` returns the scores of a chunk of tokens for all latents that some cut could make active.
    """
    wanted, depth = max(1, round(l0 * x.shape[0])), 4
    while True:
        kept, floor, active = [], -math.inf, 0
        for chunk in x.split(max(1, BLOCK // d_sae)):
            found = scores(chunk)
            active += int((found > 0).sum())
            budget = int(depth * l0 * chunk.shape[0]) + 1
            if budget < found.numel():
                found = found.topk(budget, sorted=False).values
                floor = max(floor, float(found.min()))
            kept.append(found)
        found, before = torch.cat(kept), active / x.shape[0]
        if found.numel() <= wanted:
            least = float(found.min()) if found.numel() else 0.0
            return Shift(least - 1e-3 * abs(least), before, found.numel() / x.shape[0])
        # Halfway between two entries: another order of summation must not push one across.
        cut = math.fsum(found.topk(wanted + 1).values[-2:].tolist()) / 2
        # A chunk that keeps nothing below the cut may have lost entries above it: look deeper.
        if floor <= cut:
            return Shift(cut, before, wanted / x.shape[0])
        depth *= 2

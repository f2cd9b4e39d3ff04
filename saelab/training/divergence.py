"""When training has failed: a loss that is not finite, or far above that of an SAE without any training.

With Adam a rate that is too high rarely gives infinities: a step moves every weight by about the rate, so the error
grows to millions of times the variance of the data and stays there, or falls back when every latent has died.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from saelab.errors import UserError
from saelab.training.config import TrainConfig

LIMIT = 100.0  # a reconstruction ten times as long as the activations
DOUBTFUL = 2.0  # such an SAE does not replace an earlier checkpoint
USELESS = 0.99


class Diverged(UserError):
    """The loss or the gradient is not finite, or the error exploded; the message names step, cause and remedy."""


def excess(step: int, numbers: Mapping[str, float], energy: float, first_fvu: float, config: TrainConfig) -> float:
    """FVU of a batch over what needs no training; raises :class:`Diverged` above ``LIMIT`` and where it is not finite.

    No training is needed for the largest of three: the FVU of the mean activation, which is 1; that of zero, which is
    ``energy``, the mean squared norm of the batch over the data's variance, so that a batch of outliers is compared
    with itself; and ``first_fvu``, that of the first batch. ``numbers`` has loss, gradient norm and all loss terms.
    """
    values = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    for what, name in (("loss", "loss"), ("gradient", "grad_norm")):
        if not math.isfinite(numbers[name]):
            raise Diverged(f"the {what} is not finite at step {step} ({values}); {_remedy(config)}")
    ratio = numbers["fvu"] / max(1.0, energy, first_fvu)
    if not ratio <= LIMIT:
        raise Diverged(
            f"the error exploded by step {step}: {ratio:.3g} times that without training ({values}); {_remedy(config)}"
        )
    return ratio


def failure(fvu: float, lr: float | None) -> str:
    """One sentence where a trained SAE explains less than 1 % of the variance; else empty. No single step shows it."""
    if not fvu > USELESS:
        return ""
    rate = "lr" if lr is None else f"lr={lr:.2g}"
    return (
        f"FVU {fvu:.3g} is no better than that of the mean activation: {rate} or a sparsity penalty is too high, or "
        "the run too short; lower it, or train on more tokens"
    )


def _remedy(config: TrainConfig) -> str:
    clip = "" if config.grad_clip is not None else ", or set grad_clip=1"
    return f"lower lr={config.rate:.2g}, to {config.rate / 10:.2g} say{clip}"

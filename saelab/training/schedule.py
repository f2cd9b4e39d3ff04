"""The learning rate as a pure function of the step, so that a resumed run needs no memory of it."""

from __future__ import annotations

import math

from saelab.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step: linear warm-up, constant, then the chosen decay to zero."""
    lr = config.rate
    warmup, decay = config.warmup * total, config.decay_share * total
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    left = (total - step) / decay if config.decay != "none" and decay > 0 else 1.0
    if left >= 1:
        return lr
    return lr * (left if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))

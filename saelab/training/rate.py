"""The default learning rate: a rule fitted to measured optima, and where it was measured (docs/learning-rate.md).

The published rule, ``2e-4 / sqrt(d_sae / 2^14)`` (Gao et al., 2024, figure 3), was found with 131,072 tokens per step
and very many steps. With a few hundred to a few thousand steps of a few thousand tokens it is 4 to 10 times too low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CONSTANT = 2.4e-3
STEPS, STEPS_POWER = 500, -0.30
WIDTH, WIDTH_POWER = 4096, -0.50
LEAST_STEPS, LEAST_WIDTH = 100, 768  # shorter runs and narrower SAEs than any measured take the rate of these
MOST_BATCH = 8192  # tokens per step up to which the rule was measured
PUBLISHED_BATCH = 131_072


@dataclass(frozen=True)
class Rate:
    """A learning rate, and the formula that it comes from."""

    value: float
    why: str


def published(d_sae: int) -> float:
    """The rate of Gao et al. (2024) for batches of 131,072 tokens."""
    return 2e-4 / math.sqrt(d_sae / 2**14)


def automatic(d_sae: int, n_steps: int, batch_size: int, fine_tuning: bool = False) -> Rate:
    """The learning rate for a run of ``n_steps`` steps of ``batch_size`` tokens.

    Up to 8,192 tokens per step it is ``2.4e-3 (n_steps / 500)^-0.3 (d_sae / 4096)^-0.5``, and never below the published
    rate. From there it goes over to the published rate, which holds from 131,072 tokens per step on, linearly in the
    logarithms. Trained weights (``fine_tuning``) get the published rate, because the rule was measured on training from
    the start. Activations have unit variance (see :class:`saelab.data.cache.Manifest`), whatever their units.
    """
    low = published(d_sae)
    source = f"2e-4 / sqrt({d_sae} latents / 16384), the published rate"
    if fine_tuning:
        return Rate(low, f"{source}, for fine-tuning")
    if batch_size >= PUBLISHED_BATCH:
        return Rate(low, f"{source}, for batches of {PUBLISHED_BATCH} tokens and more")
    steps, width = max(n_steps, LEAST_STEPS), max(d_sae, LEAST_WIDTH)
    rule = CONSTANT * (steps / STEPS) ** STEPS_POWER * (width / WIDTH) ** WIDTH_POWER
    if rule <= low:
        return Rate(low, f"{source}, as the rule for short runs gives less")
    why = f"{CONSTANT:.2g} ({steps} steps / {STEPS})^{STEPS_POWER:g} ({width} latents / {WIDTH})^{WIDTH_POWER:g}"
    if batch_size <= MOST_BATCH:
        return Rate(rule, why)
    share = math.log(batch_size / MOST_BATCH) / math.log(PUBLISHED_BATCH / MOST_BATCH)
    mixed = rule ** (1 - share) * low**share
    return Rate(mixed, f"between {rule:.2g} for {MOST_BATCH} tokens per step and {low:.2g} for {PUBLISHED_BATCH}")

"""The default learning rate: a rule fitted to measured optima, and where it was measured (docs/learning-rate.md).

The published rule, ``2e-4 / sqrt(d_sae / 2^14)`` (Gao et al., 2024, figure 3), was found with 131,072 tokens per step
and very many steps. With a few hundred to a few thousand steps of a few thousand tokens it is 4 to 10 times too low.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

CONSTANT = 4.6e-3
UNITS = {"batch_size": 2048, "n_steps": 500, "d_sae": 4096, "k": 32, "d_in": 576}
POWERS = {"batch_size": 0.25, "n_steps": -0.2, "d_sae": -0.45, "k": 0.4, "d_in": -0.25}
LEAST = {"n_steps": 100, "d_sae": 768, "k": 8, "d_in": 128}  # smaller numbers count as these, the least measured
MOST = {"batch_size": 8192, "k": 128}  # and larger ones as these
PUBLISHED_BATCH = 131_072


@dataclass(frozen=True)
class Rate:
    """A learning rate, and the formula that it comes from."""

    value: float
    why: str


def published(d_sae: int) -> float:
    """The rate of Gao et al. (2024) for batches of 131,072 tokens."""
    return 2e-4 / math.sqrt(d_sae / 2**14)


def rule(numbers: Mapping[str, float]) -> float:
    """The fitted rate for the five numbers of ``UNITS``, each held within what was measured where it would raise it."""
    held = _held(numbers)
    return math.exp(math.log(CONSTANT) + sum(POWERS[name] * math.log(held[name] / UNITS[name]) for name in UNITS))


def _held(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: min(max(numbers[name], LEAST.get(name, 0)), MOST.get(name, math.inf)) for name in UNITS}


def automatic(
    d_sae: int,
    n_steps: int,
    batch_size: int,
    *,
    d_in: int,
    k: float | None,
    factor: float = 1.0,
    fine_tuning: bool = False,
) -> Rate:
    """The learning rate for ``n_steps`` steps of ``batch_size`` tokens with ``k`` active latents per token.

    It is ``4.6e-3 (batch_size / 2048)^0.25 (n_steps / 500)^-0.2 (d_sae / 4096)^-0.45 (k / 32)^0.4 (d_in / 576)^-0.25``,
    and never below the published rate. Numbers with which a run would leave what was measured towards higher rates
    count as the last ones measured (fewer than 100 steps as 100, and so on); without ``k``, 32 is taken. From 8,192
    tokens per step on it goes over to the published rate, which holds from 131,072 on, linearly in the logarithms.
    Trained weights (``fine_tuning``) get the published rate, because the rule was measured on training from the start.
    ``factor`` is that of the variant (``SAE.rate_factor``). Activations are taken to be scaled to unit variance, as the
    trainer does.
    """
    low = published(d_sae)
    source = f"2e-4 / sqrt({d_sae} latents / 16384), the published rate"
    if fine_tuning:
        return Rate(low, f"{source}, for fine-tuning")
    if batch_size >= PUBLISHED_BATCH:
        return Rate(low, f"{source}, for {PUBLISHED_BATCH} tokens per step and more")
    numbers = {"batch_size": batch_size, "n_steps": n_steps, "d_sae": d_sae, "k": k or UNITS["k"], "d_in": d_in}
    found, note = factor * rule(numbers), "" if factor == 1 else f", times {factor:.2g} for this variant"
    if found <= low:
        return Rate(low, f"{source}, as the rule for short runs gives {found:.2g}")
    if batch_size <= MOST["batch_size"]:
        return Rate(found, _formula(numbers) + note)
    share = math.log(batch_size / MOST["batch_size"]) / math.log(PUBLISHED_BATCH / MOST["batch_size"])
    mixed = found ** (1 - share) * low**share
    return Rate(
        mixed, f"between {found:.2g} for {MOST['batch_size']} tokens per step and {low:.2g} for {PUBLISHED_BATCH}"
    )


def _formula(numbers: Mapping[str, float]) -> str:
    names = {"batch_size": "tokens per step", "n_steps": "steps", "d_sae": "latents", "k": "active", "d_in": "d_in"}
    powers = (f"({numbers[name]:g} {names[name]} / {UNITS[name]})^{POWERS[name]:g}" for name in UNITS)
    outside = [f"{names[name]} count as {value:g}" for name, value in _held(numbers).items() if value != numbers[name]]
    return " ".join([f"{CONSTANT:.1e}", *powers]) + (f"; {', '.join(outside)}" if outside else "")

"""``lr = "tune"`` in a grid: which learning rates are tried, and on which rows they are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saelab.errors import UserError

TUNE = "tune"


@dataclass(frozen=True)
class Tuning:
    """How rates are tuned, for all SAEs of a sweep.

    Attributes:
        factors: The rates tried, as multiples of the default rate; an own list of rates replaces them.
        validation: Share of the training contexts on which the rates are compared; no SAE of the sweep trains on them.
        stop_early: Stop rates whose error is far above the best one's before the end (see :mod:`saelab.sweep.halving`).
    """

    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    validation: float = 0.05
    stop_early: bool = True

    def __post_init__(self) -> None:
        _check(self.factors, "factors", "leave lr out")
        if not 0 < self.validation < 1:
            raise UserError(f"validation={self.validation} must be a share of the training contexts, between 0 and 1")


def rates_of(lr: Any) -> tuple[float, ...] | None:
    """The rates that ``lr`` lists; () where they are multiples of the default one; None where nothing is tuned.

    ``lr = "tune"`` asks for multiples of the default, ``lr = {tune = [5e-4, 1e-3]}`` names the rates.
    """
    if lr in (None, "auto") or (isinstance(lr, int | float) and not isinstance(lr, bool)):
        return None
    if lr == TUNE:
        return ()
    if not isinstance(lr, Mapping) or set(lr) != {TUNE} or not isinstance(lr[TUNE], list | tuple):
        raise UserError(f'lr={lr!r} must be a number, "tune", or {{tune = [...]}} with the rates to try')
    rates = tuple(lr[TUNE])
    _check(rates, TUNE, f"write lr = {rates[0]:g}" if rates and isinstance(rates[0], int | float) else "leave lr out")
    return tuple(float(rate) for rate in rates)


def _check(values: tuple[Any, ...], name: str, alternative: str) -> None:
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise UserError(f"{name}: {value!r} must be a positive and finite number")
    # Two rates with the same name would share a folder.
    if len({named(value) for value in values}) != len(values):
        raise UserError(f"{name}={list(values)} lists a rate twice; remove one")
    if len(values) < 2:
        raise UserError(f"{name}={list(values)} leaves nothing to choose; {alternative}, or give two or more")


def named(rate: float) -> str:
    """A rate in names and messages."""
    return f"{rate:.6g}"

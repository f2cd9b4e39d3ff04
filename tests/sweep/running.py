"""A sweep run to its end, or closed after some steps."""

from __future__ import annotations

from pathlib import Path

from saelab.data.cache import ActivationCache
from saelab.sweep import Member, make_grid, run_sweep


def run(grid: dict, cache: ActivationCache, folder: Path, stop: int | None = None, **options) -> list[Member]:
    """The members of a sweep after its last step, or after ``stop`` steps."""
    members: list[Member] = []
    sweep = run_sweep(make_grid(grid), cache, folder, **options)
    for members in sweep:  # noqa: B007 - the last ones are returned
        if stop is not None and (stop := stop - 1) == 0:
            sweep.close()
    return members

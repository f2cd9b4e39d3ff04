"""Vectorised work on many groups at once: ranks, samples without replacement, the best few of each group."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray


def rank_in_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2... within each run of equal numbers."""
    if not len(groups):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))


def systematic(
    sizes: NDArray[np.int64], n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Draw ``min(size, n)`` different offsets below each size; returns (group, offset, number of the draw).

    Offsets are evenly spaced from a random start, so that each is equally likely to be drawn.
    """
    taken = np.minimum(sizes, n)
    group = np.repeat(np.arange(len(sizes)), taken)
    number = rank_in_group(group)
    start = rng.random(len(sizes))
    offset = ((number + start[group]) * (sizes[group] / taken[group])).astype(np.int64)
    return group, np.minimum(offset, sizes[group] - 1), number


def by_group_descending(groups: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Order by group, then score from the highest down (ties: first come)."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.uint32).astype(np.int64)
    # Bits of a positive float order like the float itself, of a negative one the other way round.
    ascending = np.where(bits >> 31, 0xFFFFFFFF - bits, bits | 0x80000000)
    return np.argsort((groups << 32) | (0xFFFFFFFF - ascending), kind="stable")


def group_top(groups: NDArray[np.int64], scores: NDArray, top: int) -> NDArray[np.int64]:
    """Indices of the ``top`` highest scores of each group, ordered by group, best first."""
    order = by_group_descending(groups, np.asarray(scores, np.float32))
    return order[rank_in_group(groups[order]) < top]


def split_groups(groups: NDArray[np.int64], n_groups: int, *columns: NDArray) -> list[list[NDArray]]:
    """Cut columns ordered by group into one array per group (empty where a group has none)."""
    ptr = np.searchsorted(groups, np.arange(n_groups + 1))
    return [[column[a:b] for a, b in itertools.pairwise(ptr)] for column in columns]

"""Exact selection from a bfloat16 product: the product bounds every pre-activation, and few have to be computed.

On CPUs that multiply bfloat16 natively the product takes less than half the time of a float32 one. Rounding changes
``x . w`` by at most ``|dx| |w~| + |x| |dw|`` (``w~`` is ``w`` rounded, ``dx`` and ``dw`` what rounding took from each
vector, all norms known), so a latent whose upper bound is below the k-th largest lower bound cannot win. The remaining
ones, a few more than k per token, are computed in float32, and the k best of those are the k best of all. The bounds
hold for any input; a token with too many left to compute, or with numbers that are not finite, is left to the float32
product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saelab.kernels import dispatch
from saelab.kernels.memory import recycled
from saelab.kernels.numba.bounds import (
    low_driver,
    low_rows,
    reach_driver,
    reach_rows,
    round_driver,
    round_rows,
    screen_driver,
    screen_rows,
)
from saelab.kernels.numba.launch import array, empty, launch
from saelab.kernels.numba.order import kth_largest, merge_best
from saelab.kernels.numba.select import FEW_LANES
from saelab.kernels.products import products

LEAST_WORK = 1 << 28  # multiplications from which rounding the weights pays
SURE = 1.01  # on norms, for their own rounding
TINY = 1e-12  # norms below this may have parts that a bfloat16 product, or a square, takes for zero
MORE = 1.02  # keys collected beyond the budget, so that weaker rows later on do not leave it unspent
SPREAD, STAGED = 4, 64  # room for SPREAD times a row's share of a batch's budget, and STAGED more
ROOM, MARGIN = 8, 128  # a row may leave ROOM * k + MARGIN latents to compute


def pays(n: int, d_in: int, d_sae: int, k: int) -> bool:
    """Whether a selection of this size is worth screening here."""
    return dispatch.multiplies_bfloat16() and n >= 128 and 16 * k <= d_sae and n * d_in * d_sae >= LEAST_WORK


class Screen:
    """The operands of a selection, in float32 and in bfloat16, and how far a bfloat16 product may be off.

    ``reach [n] * size [d_sae]`` bounds the error of ``product[r, j]``; ``reach`` is infinite where nothing is known.
    """

    def __init__(self, x: Tensor, W_enc: Tensor, bias: np.ndarray, b_dec: Tensor | None, signed: bool) -> None:
        centred = x if b_dec is None else torch.sub(x, b_dec, out=recycled(*x.shape))
        self.x, self.W, self.bias, self.signed = array(centred), array(W_enc.T), bias, signed
        self.x16, x_size, x_lost = rounded(self.x)
        self.W16, size, lost = rounded(self.W)
        self.size = np.maximum(size, np.float32(TINY))
        if np.isfinite(size).all() and np.isfinite(bias).all():
            # Sums of d_in products in float32: in the product, and where the few are computed.
            sums = 4 * x.shape[1] * 2.0**-24
            reach = SURE * (x_lost + (x_size + x_lost) * (lost / self.size).max(initial=0.0) + sums * x_size)
            self.reach = np.where(x_size > TINY, reach, np.inf).astype(np.float32)
        else:
            self.reach = np.full(x.shape[0], np.inf, np.float32)

    def chunks(self) -> Iterator[tuple[int, np.ndarray, tuple]]:
        """For consecutive rows: the first, the product's bits, and the arguments that all kernels begin with."""
        for first, z in products(self.x16, self.W16.T):
            bits = z.view(torch.int16).numpy().view(np.uint16)
            yield first, bits, (bits, first, self.reach, self.size, self.bias, self.signed)


def topk(screen: Screen, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and columns ``[n, k]`` of the ``k`` best of each row, and the rows ``[m]`` that are left to do."""
    n = screen.x.shape[0]
    values, columns, left = np.empty(n * k, np.float32), np.empty(n * k, np.int64), np.ones(n, np.bool_)
    if np.isfinite(screen.reach).any():
        for _, z, known in screen.chunks():
            rest = screen.x, screen.W, k, ROOM * k + MARGIN, values, columns, left
            launch(screen_rows, screen_driver, z.shape[0], *known, *rest)
    found = torch.from_numpy(values).view(n, k), torch.from_numpy(columns).view(n, k)
    return *found, torch.from_numpy(left.nonzero()[0])


def batch(screen: Screen, budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Keys, values and places (row * d_sae + column) of the ``budget`` best of all rows; None where it cannot tell.

    The first rows say from which level on keys are collected. When at least ``budget`` keys reach it, none of the
    ``budget`` best was missed; when the other rows turn out so much weaker that they do not, it cannot tell.
    """
    if not np.isfinite(screen.reach).all():
        return None
    keys, values, flat, level = empty(0), empty(0), np.empty(0, np.int64), None
    for first, z, known in screen.chunks():
        level = _level(z, known, budget / screen.x.shape[0]) if level is None else level
        if level == -np.inf:
            return None
        found = _reaching(screen, z, known, level, SPREAD * -(-budget // screen.x.shape[0]) + STAGED)
        keys, values = np.concatenate([keys, found[0]]), np.concatenate([values, found[1]])
        flat = np.concatenate([flat, first * z.shape[1] + found[2]])
        kept = merge_best(keys, values, flat, budget)
        keys, values, flat = keys[:kept], values[:kept], flat[:kept]
        level = max(level, keys.min()) if kept == budget else level
    return (keys, values, flat) if keys.size == budget else None


def _level(z: np.ndarray, known: tuple, budget: float) -> np.float32:
    """A value that about ``budget`` keys per row of this chunk reach, and some more; ``-inf`` if that is all."""
    maxima = np.empty((z.shape[0], min(FEW_LANES, z.shape[1])), np.float32)
    wanted = math.ceil(MORE * budget * z.shape[0])
    if wanted > maxima.size:
        return np.float32(-np.inf)
    launch(low_rows, low_driver, z.shape[0], *known, maxima)
    return np.float32(kth_largest(maxima.reshape(-1), maxima.size, wanted))


def _reaching(screen: Screen, z: np.ndarray, known: tuple, level: np.float32, room: int) -> tuple[np.ndarray, ...]:
    """Keys, values and places within the chunk of all that reach ``level``, in order; ``room`` per row at first."""
    n = z.shape[0]
    while True:
        keys, values = np.empty((n, room), np.float32), np.empty((n, room), np.float32)
        columns, counts = np.empty((n, room), np.int64), np.empty(n, np.int64)
        rest = screen.x, screen.W, level, keys, values, columns, counts
        launch(reach_rows, reach_driver, n, *known, *rest)
        if counts.max(initial=0) <= room:
            break
        room = int(counts.max())  # some row has more than was set aside: once more, with room for the fullest
    taken = np.arange(room) < counts[:, None]
    return keys[taken], values[taken], (columns + np.arange(n)[:, None] * z.shape[1])[taken]


def rounded(rows: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """``rows [m, d]`` in bfloat16, the norm of each, and the norm of its difference from the original."""
    m, d = rows.shape
    # On memory of an earlier call, in which two of these numbers take the place of one.
    out = torch.empty(m, d, dtype=torch.bfloat16) if d % 2 else recycled(m, d // 2).view(torch.bfloat16)
    size, lost = empty(m), empty(m)
    bits = out.view(torch.int16).numpy().view(np.uint16)
    launch(round_rows, round_driver, m, rows, rows.view(np.uint32), bits, size, lost)
    return out, size, lost

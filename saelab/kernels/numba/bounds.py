"""Compiled bounds on pre-activations from a bfloat16 product, used by :mod:`saelab.kernels.numba.screen`."""

from __future__ import annotations

import numpy as np
from numba import prange

from saelab.kernels.numba.code import dot
from saelab.kernels.numba.launch import compiled
from saelab.kernels.numba.order import below_kth, trim
from saelab.kernels.numba.select import LANES

ROUNDED = np.float32(2.0**-7)  # of a bfloat16 result, however its last digit was found
ADDED = np.float32(2.0**-22)  # of a sum of two float32 numbers, and of its comparison
BLOCK = 64  # columns that are looked at one by one where any of them may win


@compiled(contract=True, reassoc=True)
def round_rows(lo, hi, source, source_bits, out, size, lost):
    """bfloat16 (nearest, ties to even) of each row, the norm of the result, and the norm of what rounding took."""
    width = source.shape[1]
    bits = np.empty(width, np.uint32)
    rounded = bits.view(np.float32)
    for r in range(lo, hi):
        row, row_bits, to = source[r], source_bits[r], out[r]
        for i in range(width):
            b = row_bits[i]
            b = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            to[i] = np.uint16(b)
            bits[i] = b << np.uint32(16)
        total, gone = np.float32(0), np.float32(0)
        for i in range(width):
            a, d = rounded[i], row[i] - rounded[i]
            total += a * a
            gone += d * d
        size[r], lost[r] = np.sqrt(total), np.sqrt(gone)


@compiled(parallel=True)
def round_driver(parts, count, source, source_bits, out, size, lost):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        round_rows(lo, hi, source, source_bits, out, size, lost)


@compiled()
def bounds(z, reach, size, bias, signed, high, best):
    """Upper bounds ``high`` of a row's keys, and per lane (column modulo ``best.size``) the largest lower bound."""
    width, lanes = z.size, best.size
    bits = np.empty(lanes, np.uint32)
    about = bits.view(np.float32)
    best[:] = -np.inf
    for start in range(0, width, lanes):
        stop = min(start + lanes, width)
        part, norm, shift, up = z[start:stop], size[start:stop], bias[start:stop], high[start:stop]
        for i in range(part.size):
            bits[i] = np.uint32(part[i]) << np.uint32(16)
        for i in range(part.size):
            v = about[i]
            gap = reach * norm[i] + ROUNDED * abs(v)
            v += shift[i]
            gap += ADDED * (abs(v) + abs(shift[i]))
            v = abs(v) if signed else v
            up[i] = v + gap
            best[i] = v - gap if v - gap > best[i] else best[i]


@compiled()
def reaching(high, level, columns):
    """The columns, in order, whose upper bound reaches ``level``; returns how many.

    Counting a block is vectorised and most blocks hold none. ``columns`` has room for one more than there are.
    """
    found = 0
    for start in range(0, high.size, BLOCK):
        part = high[start : start + BLOCK]
        hits = 0
        for i in range(part.size):
            hits += 1 if part[i] >= level else 0
        if hits > 0:
            for i in range(part.size):
                columns[found] = start + i
                found += 1 if part[i] >= level else 0
    return found


@compiled()
def screen_rows(lo, hi, z, first, reach, size, bias, signed, x, W, k, room, values, columns, left):
    """The ``k`` best of each row of a chunk that begins with row ``first``; ``left[r]`` where it cannot tell."""
    width = z.shape[1]
    lanes = LANES
    while lanes < 8 * k:
        lanes *= 2
    lanes = min(lanes, width)
    high, best, work = np.empty(width, np.float32), np.empty(lanes, np.float32), np.empty(room + lanes, np.float32)
    open_columns = np.empty(width + 1, np.int64)
    keys, found_values = np.empty(room, np.float32), np.empty(room, np.float32)
    for r in range(first + lo, first + hi):
        left[r] = True
        if not reach[r] < np.inf:
            continue
        bounds(z[r - first], reach[r], size, bias, signed, high, best)
        level = below_kth(best, k, work)
        found = reaching(high, level, open_columns)
        if level == -np.inf or found < k or found > room:
            continue
        for i in range(found):
            v = dot(x[r], W[open_columns[i]]) + bias[open_columns[i]]
            found_values[i], keys[i] = v, abs(v) if signed else v
        trim(keys, found_values, open_columns, found, k, work)
        left[r] = False
        for i in range(k):
            values[r * k + i], columns[r * k + i] = found_values[i], open_columns[i]


@compiled(parallel=True)
def screen_driver(parts, count, z, first, reach, size, bias, signed, x, W, k, room, values, columns, left):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        screen_rows(lo, hi, z, first, reach, size, bias, signed, x, W, k, room, values, columns, left)


@compiled()
def low_rows(lo, hi, z, first, reach, size, bias, signed, maxima):
    """The largest lower bound of each lane of each row: ``maxima [rows, lanes]``."""
    high = np.empty(z.shape[1], np.float32)
    for r in range(lo, hi):
        bounds(z[r], reach[first + r], size, bias, signed, high, maxima[r])


@compiled(parallel=True)
def low_driver(parts, count, z, first, reach, size, bias, signed, maxima):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        low_rows(lo, hi, z, first, reach, size, bias, signed, maxima)


@compiled()
def reach_rows(lo, hi, z, first, reach, size, bias, signed, x, W, level, keys, values, columns, counts):
    """All keys of a row that reach ``level``, as far as there is room; ``counts`` says how many there are."""
    width, room = z.shape[1], keys.shape[1]
    high, best, open_columns = np.empty(width, np.float32), np.empty(LANES, np.float32), np.empty(width + 1, np.int64)
    for r in range(lo, hi):
        bounds(z[r], reach[first + r], size, bias, signed, high, best)
        kept = 0
        for i in range(reaching(high, level, open_columns)):
            v = dot(x[first + r], W[open_columns[i]]) + bias[open_columns[i]]
            key = abs(v) if signed else v
            if key >= level:
                if kept < room:
                    keys[r, kept], values[r, kept], columns[r, kept] = key, v, open_columns[i]
                kept += 1
        counts[r] = kept


@compiled(parallel=True)
def reach_driver(parts, count, z, first, reach, size, bias, signed, x, W, level, keys, values, columns, counts):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        reach_rows(lo, hi, z, first, reach, size, bias, signed, x, W, level, keys, values, columns, counts)

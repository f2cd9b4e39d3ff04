"""Compiled selection: one pass over a row for the maxima of its lanes, then only the lanes that can hold a winner.

Column c belongs to lane c mod LANES. The k-th largest lane maximum bounds the k-th largest key from below, because the
k maxima are k distinct entries; so every winner stands in a lane whose maximum reaches the bound, ties included.
A row may be offered in blocks of columns: its best so far bound what the next block can add.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from saelab.kernels.numba.launch import compiled
from saelab.kernels.numba.order import below_kth, trim

LANES = 256
FEW_LANES = 128  # per row, where the maxima of all rows are compared with one another
PLAIN, MAGNITUDE, GRADIENT, ABOVE, MAGNITUDE_ABOVE, MAGNITUDE_GRADIENT = range(6)


@compiled()
def keys_of_row(row, bias, extra, mode, weight0, weight1, key):
    """The comparison keys of one row; what NaN would give is made ``-inf``."""
    width = row.size
    if mode == PLAIN:
        for c in range(width):
            key[c] = row[c] + bias[c]
    elif mode == MAGNITUDE:
        for c in range(width):
            key[c] = abs(row[c] + bias[c])
    elif mode == ABOVE:
        for c in range(width):
            key[c] = (row[c] + bias[c]) - extra[c]
    elif mode == MAGNITUDE_ABOVE:
        for c in range(width):
            key[c] = abs(row[c] + bias[c]) - extra[c]
    else:
        for c in range(width):
            z = row[c] + bias[c]
            z = abs(z) if mode == MAGNITUDE_GRADIENT else (np.float32(0) if z <= 0 else z)
            key[c] = z * (weight0 + weight1 * abs(extra[c]))


@compiled()
def lane_maxima(key, best):
    width, lanes = key.size, best.size
    best[:] = -np.inf
    for piece in range(width // lanes):
        # A slice has indices known to be positive, without which the loop would not be vectorised.
        part = key[piece * lanes : (piece + 1) * lanes]
        for lane in range(lanes):
            # A comparison with NaN is false: NaN never becomes a maximum.
            best[lane] = part[lane] if part[lane] > best[lane] else best[lane]
    rest = key[width // lanes * lanes :]
    for lane in range(rest.size):
        best[lane] = rest[lane] if rest[lane] > best[lane] else best[lane]


@compiled()
def candidates(key, maxima, bound, columns):
    """Columns, in any order, whose key is at least ``bound`` (NaN counts as ``-inf``). Returns how many.

    ``columns`` has room for one more than there are: writing first and counting after spares a branch.
    """
    width, lanes, found, promising = key.size, maxima.size, 0, 0
    if bound == -np.inf:
        for c in range(width):
            columns[c] = c
        return width
    for lane in range(lanes):
        promising += 1 if maxima[lane] >= bound else 0
    if 4 * promising > lanes:
        for c in range(width):
            columns[found] = c
            found += 1 if key[c] >= bound else 0
        return found
    for lane in range(lanes):
        if maxima[lane] >= bound:
            for c in range(lane, width, lanes):
                columns[found] = c
                found += 1 if key[c] >= bound else 0
    return found


@compiled()
def select_rows(lo, hi, z, first, bias, extra, mode, weights, budgets, bound, start, keys, values, columns, counts):
    """Offer the columns ``first ..`` of a product to the code of each row.

    Row r holds ``counts[r]`` entries from ``start[r]``. With a budget it keeps its ``budgets[r]`` best of old and new.
    With a negative budget it takes all keys that reach ``bound``, as far as there is room before ``start[r + 1]``, and
    ``counts[r]`` says how many there are. ``extra`` has one row for all rows, or one for each.
    """
    width = z.shape[1]
    weight0, weight1 = np.float32(weights[0]), np.float32(weights[1])
    most = width + max(0, budgets.max()) + 1
    key, work, maxima = np.empty(width, np.float32), np.empty(most, np.float32), np.empty(width, np.float32)
    new_keys, new_values, new_columns = np.empty(most, np.float32), np.empty(most, np.float32), np.empty(most, np.int64)
    for r in range(lo, hi):
        k, at = budgets[r], start[r]
        if k == 0:
            continue
        keys_of_row(z[r], bias, extra[r % extra.shape[0]], mode, weight0, weight1, key)
        lanes = LANES
        while lanes < 8 * k:
            lanes *= 2
        lanes = min(lanes, width)
        best = maxima[:lanes]
        lane_maxima(key, best)
        held, level = 0, np.float32(bound)
        if k > 0:
            held, level = counts[r], np.float32(-np.inf)
            if held == k:
                # A later column loses a tie, so only what lies above the smallest key held is of interest.
                level = np.nextafter(keys[at : at + k].min(), np.float32(np.inf))
            elif k <= lanes:
                level = below_kth(best, k, work)
        for i in range(held):
            new_keys[i], new_values[i], new_columns[i] = keys[at + i], values[at + i], columns[at + i]
        found = candidates(key, best, level, new_columns[held:])
        for i in range(held, held + found):
            c = new_columns[i]
            new_keys[i] = key[c] if key[c] == key[c] else -np.inf
            new_values[i] = z[r, c] + bias[c]
            new_columns[i] = c + first
        found += held
        if k > 0:
            found = trim(new_keys, new_values, new_columns, found, k, work)
        counts[r] = found
        for i in range(min(found, start[r + 1] - at)):
            keys[at + i], values[at + i], columns[at + i] = new_keys[i], new_values[i], new_columns[i]


@compiled(parallel=True)
def select_driver(
    parts, count, z, first, bias, extra, mode, weights, budgets, bound, start, keys, values, columns, counts
):
    for part in prange(parts):
        lo, hi = part * count // parts, (part + 1) * count // parts
        select_rows(lo, hi, z, first, bias, extra, mode, weights, budgets, bound, start, keys, values, columns, counts)


@compiled()
def maxima_rows(lo, hi, z, bias, extra, mode, maxima):
    """The lane maxima of each row: ``maxima [rows, lanes]``."""
    key = np.empty(z.shape[1], np.float32)
    for r in range(lo, hi):
        keys_of_row(z[r], bias, extra[0], mode, np.float32(1), np.float32(0), key)
        lane_maxima(key, maxima[r])


@compiled(parallel=True)
def maxima_driver(parts, count, z, bias, extra, mode, maxima):
    for part in prange(parts):
        maxima_rows(part * count // parts, (part + 1) * count // parts, z, bias, extra, mode, maxima)

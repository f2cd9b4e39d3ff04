"""Compiled selection: one pass over a row for the maxima of its lanes, then only the lanes that can hold a winner.

Column c belongs to lane c mod LANES. The k-th largest lane maximum bounds the k-th largest key from below, because the
k maxima are k distinct entries; so every winner stands in a lane whose maximum reaches the bound, ties included.
A row may be offered in blocks of columns: its best so far bound what the next block can add.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from saelab.kernels.numba_launch import compiled

LANES = 128
FEW = 96  # up to so many promising lanes are visited one by one; beyond, the row is read once more
PLAIN, MAGNITUDE, GRADIENT, ABOVE, MAGNITUDE_ABOVE, MAGNITUDE_GRADIENT = range(6)


@compiled()
def kth_largest(a, n, k):
    """The k-th largest of ``a[:n]`` (k from 1) by quickselect; reorders ``a``. No NaN."""
    low, high, target = 0, n - 1, k - 1
    while low < high:
        pivot = a[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while a[i] > pivot:
                i += 1
            while a[j] < pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i += 1
                j -= 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break
    return a[target]


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
def lane_maxima(key, lanes, maxima):
    width, best = key.size, maxima[:lanes]
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
def candidates(key, lanes, maxima, bound, columns):
    """Columns, in any order, whose key is at least ``bound`` (NaN counts as ``-inf``). Returns how many."""
    width, found, promising = key.size, 0, 0
    for lane in range(lanes):
        promising += 1 if maxima[lane] >= bound else 0
    if bound == -np.inf:
        for c in range(width):
            columns[c] = c
        return width
    if promising > FEW:
        for c in range(width):
            if key[c] >= bound:
                columns[found] = c
                found += 1
        return found
    for lane in range(lanes):
        if maxima[lane] >= bound:
            for c in range(lane, width, lanes):
                if key[c] >= bound:
                    columns[found] = c
                    found += 1
    return found


@compiled()
def order_by_column(keys, values, columns, found):
    """Insertion sort: entries that need it are few, and those of a wide row already stand in order."""
    for i in range(1, found):
        key, value, column, at = keys[i], values[i], columns[i], i
        while at > 0 and columns[at - 1] > column:
            keys[at], values[at], columns[at] = keys[at - 1], values[at - 1], columns[at - 1]
            at -= 1
        keys[at], values[at], columns[at] = key, value, column


@compiled()
def trim(keys, values, columns, found, k, work):
    """Keep the k largest of the first ``found`` entries, ties to the lowest column. Returns how many."""
    if found <= k:
        return found
    work[:found] = keys[:found]
    last = kth_largest(work, found, k)
    ties, tied = k, 0
    for i in range(found):
        ties -= 1 if keys[i] > last else 0
        tied += 1 if keys[i] == last else 0
    if tied > ties:
        order_by_column(keys, values, columns, found)
    kept = 0
    for i in range(found):
        if keys[i] > last or (keys[i] == last and ties > 0):
            ties -= 1 if keys[i] == last else 0
            keys[kept], values[kept], columns[kept] = keys[i], values[i], columns[i]
            kept += 1
    return kept


@compiled()
def select_rows(lo, hi, z, first, bias, extra, mode, weights, budgets, bound, start, keys, values, columns, counts):
    """Offer the columns ``first ..`` of a product to the code of each row.

    Row r holds ``counts[r]`` entries from ``start[r]``. With a budget it keeps its ``budgets[r]`` best of old and new.
    With a negative budget it takes all keys that reach ``bound``, as far as there is room before ``start[r + 1]``, and
    ``counts[r]`` says how many there are. ``extra`` has one row for all rows, or one for each.
    """
    width = z.shape[1]
    weight0, weight1 = np.float32(weights[0]), np.float32(weights[1])
    most = width + max(0, budgets.max())
    key, work, maxima = np.empty(width, np.float32), np.empty(most, np.float32), np.empty(width, np.float32)
    new_keys, new_values, new_columns = np.empty(most, np.float32), np.empty(most, np.float32), np.empty(most, np.int64)
    for r in range(lo, hi):
        k, at = budgets[r], start[r]
        if k == 0:
            continue
        keys_of_row(z[r], bias, extra[r % extra.shape[0]], mode, weight0, weight1, key)
        lanes = LANES
        while lanes < 4 * k:
            lanes *= 2
        lanes = min(lanes, width)
        lane_maxima(key, lanes, maxima)
        held, level = 0, np.float32(bound)
        if k > 0:
            held, level = counts[r], np.float32(-np.inf)
            if held == k:
                # A later column loses a tie, so only what lies above the smallest key held is of interest.
                level = np.nextafter(keys[at : at + k].min(), np.float32(np.inf))
            elif k <= lanes:
                work[:lanes] = maxima[:lanes]
                level = kth_largest(work, lanes, k)
        for i in range(held):
            new_keys[i], new_values[i], new_columns[i] = keys[at + i], values[at + i], columns[at + i]
        found = candidates(key, lanes, maxima, level, new_columns[held:])
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
        lane_maxima(key, maxima.shape[1], maxima[r])


@compiled(parallel=True)
def maxima_driver(parts, count, z, bias, extra, mode, maxima):
    for part in prange(parts):
        maxima_rows(part * count // parts, (part + 1) * count // parts, z, bias, extra, mode, maxima)


@compiled()
def merge_best(keys, values, flat, budget):
    """Keep, in place, the ``budget`` largest keys, ties to the lowest ``flat``. Returns how many there are."""
    n = keys.size
    if n <= budget:
        return n
    last = kth_largest(keys.copy(), n, budget)
    slots, tied = budget, 0
    for i in range(n):
        slots -= 1 if keys[i] > last else 0
        tied += 1 if keys[i] == last else 0
    # Of the entries that tie for the last places the lowest positions win.
    positions, t = np.empty(tied, np.int64), 0
    for i in range(n):
        if keys[i] == last:
            positions[t] = -flat[i]
            t += 1
    highest = -kth_largest(positions, tied, slots)
    kept = 0
    for i in range(n):
        if keys[i] > last or (keys[i] == last and flat[i] <= highest):
            keys[kept], values[kept], flat[kept] = keys[i], values[i], flat[i]
            kept += 1
    return kept


@compiled()
def pack(start, counts, keys, values, columns, out_keys, out_values, out_columns):
    """Close the gaps between rows."""
    at = 0
    for r in range(counts.size):
        for i in range(start[r], start[r] + counts[r]):
            out_keys[at], out_values[at], out_columns[at] = keys[i], values[i], columns[i]
            at += 1

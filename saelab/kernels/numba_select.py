"""Compiled selection: one pass over a row for the maxima of its lanes, then only the lanes that can hold a winner.

Column c belongs to lane c mod LANES. The k-th largest lane maximum bounds the k-th largest key from below, because the
k maxima are k distinct entries; so every winner stands in a lane whose maximum reaches the bound, ties included.
Candidates are brought into column order, which makes "ties to the lowest index" a matter of counting.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from saelab.kernels.numba_launch import compiled

LANES = 512
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
    width = key.size
    maxima[:lanes] = -np.inf
    whole = width // lanes * lanes
    for base in range(0, whole, lanes):
        for lane in range(lanes):
            # A comparison with NaN is false: NaN never becomes a maximum.
            maxima[lane] = key[base + lane] if key[base + lane] > maxima[lane] else maxima[lane]
    for c in range(whole, width):
        lane = c - whole
        maxima[lane] = key[c] if key[c] > maxima[lane] else maxima[lane]


@compiled()
def candidates(key, lanes, maxima, bound, columns):
    """Columns, ascending, whose key is at least ``bound`` (NaN counts as ``-inf``). Returns how many."""
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
                    at = found
                    while at > 0 and columns[at - 1] > c:
                        columns[at] = columns[at - 1]
                        at -= 1
                    columns[at] = c
                    found += 1
    return found


@compiled()
def trim(key, columns, found, k, work):
    """Keep the k largest of the candidates, ties to the lowest column, in column order."""
    for i in range(found):
        v = key[columns[i]]
        work[i] = v if v == v else -np.inf
    last = kth_largest(work, found, k)
    ties = k
    for i in range(found):
        ties -= 1 if key[columns[i]] > last else 0
    kept = 0
    for i in range(found):
        v = key[columns[i]]
        v = v if v == v else -np.inf
        if v > last or (v == last and ties > 0):
            ties -= 1 if v == last else 0
            columns[kept] = columns[i]
            kept += 1


@compiled()
def select_rows(lo, hi, z, bias, extra, mode, weights, budgets, bound, clip, start, values, indices, counts):
    """Row r's ``budgets[r]`` largest keys, or with a negative budget all keys that reach ``bound``.

    Winners go to ``values[start[r]:]``, at most ``start[r + 1] - start[r]`` of them; ``counts[r]`` says how many there
    are. ``extra`` has one row for all, or one per row.
    """
    width = z.shape[1]
    weight0, weight1, cut = np.float32(weights[0]), np.float32(weights[1]), np.float32(bound)
    key, work = np.empty(width, np.float32), np.empty(width, np.float32)
    columns, maxima = np.empty(width, np.int64), np.empty(width, np.float32)
    for r in range(lo, hi):
        row, k = z[r], budgets[r]
        if k == 0:
            counts[r] = 0
            continue
        keys_of_row(row, bias, extra[r % extra.shape[0]], mode, weight0, weight1, key)
        lanes = LANES
        while lanes < 2 * k:
            lanes *= 2
        lanes = min(lanes, width)
        lane_maxima(key, lanes, maxima)
        level = cut
        if k > 0:
            level = np.float32(-np.inf)
            if k <= lanes:
                work[:lanes] = maxima[:lanes]
                level = kth_largest(work, lanes, k)
        found = candidates(key, lanes, maxima, level, columns)
        if k > 0:
            trim(key, columns, found, k, work)
            found = k
        counts[r] = found
        at = start[r]
        for i in range(min(found, start[r + 1] - at)):
            v = row[columns[i]] + bias[columns[i]]
            values[at + i] = np.float32(0) if clip and v <= 0 else v
            indices[at + i] = columns[i]


@compiled(parallel=True)
def select_driver(parts, count, z, bias, extra, mode, weights, budgets, bound, clip, start, values, indices, counts):
    for part in prange(parts):
        select_rows(
            part * count // parts,
            (part + 1) * count // parts,
            z,
            bias,
            extra,
            mode,
            weights,
            budgets,
            bound,
            clip,
            start,
            values,
            indices,
            counts,
        )


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
def merge_best(keys, flat, values, budget, work):
    """Keep, in place and in order, the ``budget`` largest keys, ties to the first. Returns how many."""
    n = keys.size
    if n <= budget:
        return n
    for i in range(n):
        work[i] = keys[i]
    last = kth_largest(work, n, budget)
    ties = budget
    for i in range(n):
        ties -= 1 if keys[i] > last else 0
    kept = 0
    for i in range(n):
        if keys[i] > last or (keys[i] == last and ties > 0):
            ties -= 1 if keys[i] == last else 0
            keys[kept], flat[kept], values[kept] = keys[i], flat[i], values[i]
            kept += 1
    return kept


@compiled()
def pack(start, counts, values, indices, out_values, out_indices):
    """Close the gaps between rows."""
    at = 0
    for r in range(counts.size):
        for i in range(start[r], start[r] + counts[r]):
            out_values[at], out_indices[at] = values[i], indices[i]
            at += 1

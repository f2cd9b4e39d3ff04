"""Compiled order statistics: bounds on the k-th largest, and keeping the k largest."""

from __future__ import annotations

import numpy as np

from saelab.kernels.numba.launch import compiled

HALVINGS = 16
SLACK = 24  # entries above a bound that need not be told from the k largest yet
COMPARISONS = 2048  # spent at most on dropping surplus entries one by one


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
def below_kth(a, k, work):
    """A value that at least ``k`` entries of ``a`` reach, mostly the k-th largest itself. No NaN.

    Counting entries above a guess is vectorised and has no branches to mispredict: for a few hundred entries, halving
    the range of the guess costs a fifth of a quickselect. Where halving does not narrow it down, because of ties or
    outliers or infinities, quickselect decides.
    """
    low, high = a[0], a[0]
    for i in range(a.size):
        low = a[i] if a[i] < low else low
        high = a[i] if a[i] > high else high
    reach = a.size
    for _ in range(HALVINGS):
        middle = low + (high - low) * np.float32(0.5)
        count = 0
        for i in range(a.size):
            count += 1 if a[i] >= middle else 0
        if count >= k:
            low, reach = middle, count
        else:
            high = middle
        if reach == k:
            return low
    if reach <= k + SLACK and low > -np.inf:
        return low
    work[: a.size] = a
    return kth_largest(work, a.size, k)


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
def smallest(keys, columns, last):
    """Position of the smallest key among entries ``0 .. last``; of equal ones, that of the highest column."""
    worst, key, column = 0, keys[0], columns[0]
    for i in range(1, last + 1):
        if keys[i] < key or (keys[i] == key and columns[i] > column):
            worst, key, column = i, keys[i], columns[i]
    return worst


@compiled()
def trim(keys, values, columns, found, k, work):
    """Keep the k largest of the first ``found`` entries, ties to the lowest column. Returns how many."""
    if (found - k) * found <= COMPARISONS:
        while found > k:
            found -= 1
            worst = smallest(keys, columns, found)
            keys[worst], values[worst], columns[worst] = keys[found], values[found], columns[found]
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

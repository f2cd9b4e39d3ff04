"""Order statistics of the compiled selection, on the values that mislead a search by halving."""

from __future__ import annotations

import numpy as np
import pytest

from saelab.kernels.dispatch import obstacle

if obstacle("numba") is not None:
    pytest.skip(str(obstacle("numba")), allow_module_level=True)

from saelab.kernels.numba.order import SLACK, below_kth, kth_largest, trim

NORMAL = np.random.default_rng(0).standard_normal(300).astype(np.float32)
ROWS = {
    "ordinary": NORMAL,
    "one outlier": np.where(np.arange(300) == 7, np.float32(1e30), NORMAL),
    "huge range": (np.sign(NORMAL) * np.exp(20 * np.abs(NORMAL.astype(float)))).clip(-3e38, 3e38).astype(np.float32),
    "all equal": np.full(300, 0.5, np.float32),
    "two values": np.where(NORMAL > 1, np.float32(2), np.float32(-2)),
    "mostly minus infinity": np.where(np.arange(300) % 29, np.float32(-np.inf), NORMAL),
    "infinities": np.where(np.arange(300) % 50, NORMAL, np.float32(np.inf)),
    "denormal": NORMAL * np.float32(1e-40),
    "one": NORMAL[:1],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("k", [1, 2, 31, 150, 299, 300])
def test_a_bound_is_reached_by_k_and_by_few_more(name: str, k: int) -> None:
    row, work = ROWS[name], np.empty(300, np.float32)
    k = min(k, row.size)
    bound, exact = below_kth(row, k, work), np.sort(row)[::-1][k - 1]
    assert (row >= bound).sum() >= k
    assert bound == exact or (row >= bound).sum() <= k + SLACK
    assert kth_largest(row.copy(), row.size, k) == exact


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("k", [1, 3, 31, 290])
def test_trimming_keeps_the_largest_and_of_equals_the_lowest_columns(name: str, k: int) -> None:
    row = ROWS[name]
    for found in {min(row.size, k + extra) for extra in (0, 1, 20, 200)}:
        columns = np.random.default_rng(found).permutation(1000)[:found].astype(np.int64)
        keys, values, work = row[:found].copy(), row[:found] * 2, np.empty(300, np.float32)
        kept = trim(keys, values, own := columns.copy(), found, k, work)
        best = np.lexsort((columns, -row[:found]))[:k]
        assert kept == min(k, found)
        assert set(own[:kept]) == set(columns[best])
        assert sorted(zip(own[:kept], keys[:kept], values[:kept])) == sorted(
            zip(columns[best], row[best], row[best] * 2)
        )

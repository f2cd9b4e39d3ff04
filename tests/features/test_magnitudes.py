"""Activations of any size have the index that activations of ordinary size have, in their own units."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from saelab import ActivationCache, build
from saelab.evaluation.controls.dictionaries import raw_channels
from saelab.features import IndexConfig, build_index
from saelab.features.indexing.groups import group_top
from saelab.sae import SAE, LinearSAE

CONTEXT, N_CONTEXTS, D_IN, D_SAE, VOCAB = 16, 40, 6, 24, 11
IN_UNITS = ["max", "mean", "q05", "q25", "q50", "q75", "q95"]  # columns in units of the activations


def scaled(folder: Path, variant: str, power: int) -> tuple[SAE, ActivationCache, pd.DataFrame]:
    """The SAE, cache and table of one world whose activations are multiplied by ``2**power``, which is exact."""
    torch.manual_seed(3)
    acts = torch.randn(CONTEXT * N_CONTEXTS, D_IN) + 0.5
    tokens = torch.randint(0, VOCAB, (len(acts),))
    sae = build(variant, D_IN, D_SAE, k=3).eval()
    assert isinstance(sae, LinearSAE)
    with torch.no_grad():
        sae.b_dec.copy_(acts.mean(0))
        for name in ("b_dec", "b_enc"):
            getattr(sae, name).mul_(2.0**power)
    cache = ActivationCache.from_tensors(folder / "cache", acts * 2.0**power, tokens, context_length=CONTEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        strings = [f" t{i}" for i in range(VOCAB)]
        index = build_index(sae, cache, folder / "run", token_strings=strings, config=IndexConfig(neighbours=4))
    return sae, cache, index.table()


@pytest.mark.parametrize("variant", ["topk", "abs_topk"])
@pytest.mark.parametrize("power", [-110, 100, 125])
def test_the_index_is_that_of_ordinary_sizes(tmp_path: Path, variant: str, power: int) -> None:
    plain = scaled(tmp_path / "plain", variant, 0)[2]
    table = scaled(tmp_path / "scaled", variant, power)[2]
    assert plain["norm_corr"].notna().all() and plain["mean_cosine"].abs().max() > 0.1 and plain["label"].any()
    table[IN_UNITS] = table[IN_UNITS].astype(float) * 2.0**-power
    pd.testing.assert_frame_equal(table, plain, check_dtype=False, rtol=1e-5)


def test_totals_beyond_float32_keep_their_order() -> None:
    scores = np.array([3e38, 5e38, 4e38, 1e39, 9e38])
    assert group_top(np.array([0, 0, 0, 1, 1]), scores, 2).tolist() == [1, 2, 3, 4]
    assert group_top(np.array([0, 0]), np.array([np.nan, 1.0]), 1).size == 1
    assert group_top(np.array([], np.int64), np.array([]), 2).size == 0


def test_a_control_explains_as_much_at_any_size(tmp_path: Path) -> None:
    explained = []
    for power in (0, 100):
        sae, cache, _ = scaled(tmp_path / str(power), "topk", power)
        control = raw_channels(sae, cache, 3.0)
        x = cache.read(torch.arange(cache.n_rows)).acts
        with torch.no_grad():
            error, whole = ((part * 2.0**-power).square().sum() for part in (x - control(x), x - x.mean(0)))
        explained.append(float(error / whole))
    assert explained[0] == pytest.approx(explained[1], rel=1e-5) and explained[0] < 0.9

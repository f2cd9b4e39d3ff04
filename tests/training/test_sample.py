"""What is set on a sample of training rows holds for all of them."""

from __future__ import annotations

from pathlib import Path

import torch

from saelab.data.cache import ActivationCache
from saelab.sae import build
from saelab.training import TrainConfig, train
from saelab.training.loop import SAMPLE, sample_of


def test_thresholds_hold_on_all_training_rows_where_text_changes_on_the_way(tmp_path: Path) -> None:
    n, generator = 3 * SAMPLE, torch.Generator().manual_seed(0)
    growing = torch.linspace(0.2, 2, n)[:, None]
    x = torch.randn(n, 6, generator=generator).abs() * growing
    cache = ActivationCache.from_tensors(tmp_path / "cache", x, held_out=0.1)
    cache.window_bytes = 1  # the first rows of a pass come from one place
    torch.manual_seed(0)
    sae = build("batch_topk", 6, 24, k=3)
    train(sae, cache, TrainConfig(batch_size=4096))
    rows = torch.cat([batch.acts for batch in cache.head(split="train")])
    with torch.no_grad():
        l0 = sae.encode(rows).l0().double().mean().item()
    # A mean over 256 places of 128 rows: the growth between two places is a 256th of the whole.
    assert abs(l0 / 3 - 1) < 0.02


def test_the_sample_is_spread_and_has_no_row_twice(tmp_path: Path) -> None:
    for n in (10, SAMPLE, SAMPLE + 1, 2 * SAMPLE + 77):
        x = torch.arange(n, dtype=torch.float32)[:, None].expand(n, 1)
        cache = ActivationCache.from_tensors(tmp_path / str(n), x, held_out=0)
        rows = (sample_of(cache)[:, 0] / cache.manifest.scale).round().long()
        assert len(rows) == len(rows.unique()) == min(n, SAMPLE)
        assert rows.min() == 0 and rows.max() == n - 1

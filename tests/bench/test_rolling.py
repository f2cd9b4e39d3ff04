"""The benchmark of rolling caches does the same work both ways."""

from __future__ import annotations

import json
from pathlib import Path

from saelab.bench.rolling import Comparison, Options
from saelab.data.cache import ActivationCache
from tests import tiny_lm


def test_both_ways_do_the_same_work(tmp_path: Path) -> None:
    lines = [json.dumps({"text": tiny_lm.sentences(60, seed)}) + "\n" for seed in range(250)]
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    options = Options(
        model=str(tiny_lm.save_llama(tmp_path / "model", num_hidden_layers=2)),
        hook="blocks.0.hook_resid_post", text=str(tmp_path / "text.jsonl"), tokens=5000, window_tokens=2048,
        context_length=32, batch_size=512, d_sae=32, k=4, cache_gb=0.1, rounds=1,
    )  # fmt: skip
    comparison = Comparison(options, tmp_path)
    found = comparison.run()
    assert ActivationCache(tmp_path / "cache").manifest.n_tokens == comparison.text_tokens
    assert ActivationCache(tmp_path / "rolling").n_split("held_out") > 0
    assert all(ratio > 0 for ratio in found["ratios"].values())

"""The measure of what a bf16 selection changes."""

from __future__ import annotations

import pytest
import torch

from saelab.bench.precision import agreement
from saelab.kernels import candidates
from saelab.sae import build


@pytest.mark.parametrize("variant", ["topk", "batch_topk", "relu"])
def test_spare_candidates_mend_what_rounding_changes(variant: str) -> None:
    torch.manual_seed(0)
    sae, x = build(variant, 64, 512, l0=8), torch.randn(500, 64)
    if variant == "relu":
        sae.b_enc.data.fill_(-0.3 * 8)  # few are active
    found = agreement(sae.train(), x)  # pyright: ignore
    assert found["bf16_tokens"] >= found["rounded_tokens"] and found["bf16_latents"] > 0.999
    if variant != "relu":
        assert found["latents_per_token"] == 8 and found["rounded_tokens"] < 1
    assert candidates.surplus(32, 1000) == 40  # what was measured is what is used

"""Tiny models of several families in double precision, with random SAEs at their places."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from saelab.runs import Run
from saelab.sae import SAE, build
from tests import tiny_lm
from tests.zoo.families import FAMILIES, WIDTH

PROMPT = "the cat sat on a mat"
SIZES = {"relu": {}, "jump_relu": {}, "gated": {}, "matching_pursuit": {"n_steps": 5}}
LATENTS = 48


@cache
def model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A plain model with its tokenizer; shared, so that a test must leave no hook behind."""
    found = FAMILIES[name].build().to(dtype)
    found.tokenizer = tiny_lm.tokenizer()
    return found


def sae(
    variant: str = "topk", seed: int = 0, dtype: torch.dtype = torch.float64, d_in: int = WIDTH, **options: Any
) -> SAE:
    """A random SAE in eval mode in which some latents fire on any input and others do not."""
    torch.manual_seed(seed)
    settings = SIZES.get(variant, {"k": 5})
    found = build(variant, d_in=d_in, d_sae=LATENTS, **settings, **options)
    with torch.no_grad():
        found.b_dec.normal_(std=0.1)
        for name in ("b_enc", "b_gate", "b_mag"):
            if isinstance(getattr(found, name, None), Tensor):
                getattr(found, name).normal_(std=0.1)
    found.calibrate([2.0 * torch.randn(200, d_in)])
    return found.eval().to(dtype)


def runs(*blocks: int, variant: str = "topk", point: str = "hook_resid_post", **options: Any) -> list[Run]:
    """One random SAE at a point of each block."""
    return [Run(sae(variant, block, **options), f"blocks.{block}.{point}") for block in blocks]

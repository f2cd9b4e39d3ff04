"""Sizes and folders of the notebooks; ``SAELAB_NOTEBOOK_QUICK=1`` shrinks everything to what a test can wait for.

The notebooks share one activation cache and one trained run: whichever needs them first makes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from saelab import ActivationCache, TrainConfig, build
from saelab.train import finished, fit
from saelab.viz import LIGHT as COLOURS  # noqa: F401

QUICK = os.environ.get("SAELAB_NOTEBOOK_QUICK") == "1"
FOLDER = Path(os.environ.get("SAELAB_NOTEBOOK_FOLDER", "../demo/notebooks"))
MODEL, HOOK = "smollm2", "blocks.9.hook_resid_post"
TOKENS, CONTEXT = (3_000, 64) if QUICK else (200_000, 128)
GRADIENT_TOKENS = 800 if QUICK else 100_000
D_SAE, K = (192, 8) if QUICK else (4608, 32)
TRAIN = TrainConfig(epochs=4, batch_size=256) if QUICK else TrainConfig()
SEEDS = [0] if QUICK else [0, 1]
STEER_TOKENS = 3 if QUICK else 30
TOLERANCE, PATH_STEPS = (0.3, 3) if QUICK else (0.02, 16)
STRENGTHS = ["0.4norm"] if QUICK else ["0.1norm", "0.2norm", "0.4norm", "0.8norm"]


def demo_cache(gradients: bool = False) -> ActivationCache:
    """Activations of the demo model on the sample text; with gradients of its loss on request."""
    path = FOLDER / ("cache_gradients" if gradients else "cache")
    if not path.exists():
        from saelab.lm import HarvestConfig, harvest

        tokens = GRADIENT_TOKENS if gradients else TOKENS
        config = HarvestConfig(tokens=tokens, context_length=CONTEXT, gradients=gradients)
        harvest(MODEL, HOOK, "wiki-sample", path, config)
    return ActivationCache(path)


def demo_run(variant: str = "topk") -> Path:
    """A run folder with an SAE trained on the demo cache."""
    folder = FOLDER / variant
    if not finished(folder):
        cache = demo_cache()
        torch.manual_seed(TRAIN.seed)
        sae = build(variant, d_in=cache.d_in, d_sae=D_SAE, k=K)
        for _ in fit(sae, cache, TRAIN, folder, resume=folder.exists()):
            pass
    return folder

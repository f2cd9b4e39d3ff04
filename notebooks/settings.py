"""Sizes and folders of the notebooks; ``SAELAB_NOTEBOOK_QUICK=1`` shrinks everything to what a test can wait for.

The notebooks share one activation cache, made by whichever needs it first. SAEs to look at come from ``checkpoints/``;
where one is not there, it is trained on that cache.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from saelab import ActivationCache, FeatureIndex, TrainConfig, build, build_index, load_model
from saelab.sae.weights import load_sae
from saelab.features import LogitLens
from saelab.lm import unembedding
from saelab.training import finished, train
from saelab.viz import LIGHT as COLOURS  # noqa: F401

QUICK = os.environ.get("SAELAB_NOTEBOOK_QUICK") == "1"
FOLDER = Path(os.environ.get("SAELAB_NOTEBOOK_FOLDER", "../demo/notebooks"))
SHIPPED = Path(os.environ.get("SAELAB_NOTEBOOK_CHECKPOINTS", Path(__file__).parent.parent / "checkpoints"))
SHIPPED_AS = {} if QUICK else {"topk": "topk_16384"}  # where the folder is not called after the variant
MODEL, HOOK = "smollm2", "blocks.9.hook_resid_post"
TOKENS, CONTEXT = (3_000, 64) if QUICK else (200_000, 128)
GRADIENT_TOKENS = 400 if QUICK else 30_000  # a backward pass each
D_SAE, K = (192, 8) if QUICK else (4608, 32)
SWEEP_D_SAE = 192 if QUICK else 1152
TRAIN = TrainConfig(epochs=4, batch_size=256) if QUICK else TrainConfig()
SEEDS = [0] if QUICK else [0, 1]
STEER_TOKENS = 3 if QUICK else 30
CANDIDATES = 4 if QUICK else 24  # latents whose effect is tried
TOLERANCE, PATH_STEPS = (0.3, 3) if QUICK else (0.02, 16)
N_RANDOM = 2 if QUICK else 4
N_PROMPTS = 1 if QUICK else None
STRENGTHS = ["0.4norm"] if QUICK else ["0.1norm", "0.2norm", "0.4norm", "0.8norm"]


def demo_cache(gradients: bool = False) -> ActivationCache:
    """Activations of the demo model on the sample text; with gradients of its loss on request."""
    path = FOLDER / ("cache_gradients" if gradients else "cache")
    if not path.exists():
        from saelab.harvesting import HarvestConfig, harvest

        tokens = GRADIENT_TOKENS if gradients else TOKENS
        config = HarvestConfig(tokens=tokens, context_length=CONTEXT, gradients=gradients)
        harvest(MODEL, HOOK, "wiki-sample", path, config)
    return ActivationCache(path)


def demo_run(variant: str = "topk") -> Path:
    """A run folder with an SAE of the demo model: a copy of the shipped one, or one trained on the demo cache."""
    folder, shipped = FOLDER / variant, SHIPPED / SHIPPED_AS.get(variant, variant)
    if not folder.exists() and (shipped / "cfg.json").is_file():
        # A copy, because notebooks write beside it: an index, recipes.
        shutil.copytree(shipped, folder.with_name(f".{variant}"), dirs_exist_ok=True).rename(folder)
    if not finished(folder):
        cache = demo_cache()
        torch.manual_seed(TRAIN.seed)
        sae = build(variant, d_in=cache.d_in, d_sae=D_SAE, k=K)
        train(sae, cache, TRAIN, folder, resume=folder.exists())
    return folder


def demo_index(variant: str = "topk") -> FeatureIndex:
    """The feature index of :func:`demo_run`: the one it came with, or one built over the demo cache."""
    folder = demo_run(variant)
    if not (folder / "features" / "features.parquet").is_file():
        build_index(load_sae(folder), demo_cache(), folder, lens=LogitLens(*unembedding(load_model(MODEL))))
    return FeatureIndex(folder)

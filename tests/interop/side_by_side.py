"""Train a TopK SAE with SAELens and with saelab on the same activations and tokens, and compare on held-out ones.

    .venv-interop/bin/python -m tests.interop.side_by_side demo/cache --epochs 3

SAELens runs its own trainer with its own defaults (learning rate 3e-4, constant; activations scaled to norm
sqrt(d_in)); saelab runs with its defaults. The batches are the same, in the same order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.sae import build
from saelab.training import TrainConfig, n_steps, train_steps


def held_out_fvu(recon, cache: ActivationCache) -> float:
    """``sum ||x - recon(x)||^2 / sum ||x - mean||^2`` over all held-out rows, in float64."""
    x = torch.cat([batch.acts for batch in cache.batches(4096, split="held_out", seed=None)])
    with torch.no_grad():
        error = torch.cat([(part - recon(part)).double().square().sum(1) for part in x.split(4096)])
    return (error.sum() / (x.double() - x.double().mean(0)).square().sum()).item()


def batches(cache: ActivationCache, config: TrainConfig) -> Iterator[Tensor]:
    """The training batches in saelab's order; goes on for ever, since SAELens draws a few for its scale first."""
    epoch = 0
    while True:
        for batch in cache.batches(config.batch_size, split="train", seed=config.seed, epoch=epoch, drop_last=True):
            yield batch.acts
        epoch += 1


def saelens(cache: ActivationCache, config: TrainConfig, d_sae: int, k: int) -> float:
    """Held-out FVU of SAELens' TopK."""
    normalise = "expected_average_only_in"
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=cache.d_in, d_sae=d_sae, k=k, normalize_activations=normalise))
    size = config.batch_size
    options = {"n_batches_for_norm_estimate": 20, "lr_end": 3e-5}  # the default lr_end stops it with an empty error
    settings = SAETrainerConfig(n_steps(cache, config) * size, size, **options)
    trained = SAETrainer(settings, sae, batches(cache, config)).fit()
    return held_out_fvu(trained.eval(), cache)


def ours(cache: ActivationCache, config: TrainConfig, d_sae: int, k: int) -> float:
    """Held-out FVU of saelab's TopK."""
    sae = build("topk", cache.d_in, d_sae, k=k)
    for _ in train_steps(sae, cache, config):
        pass
    return held_out_fvu(sae, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cache, config = ActivationCache(args.cache), TrainConfig(epochs=args.epochs, seed=args.seed)
    result = {"tokens": n_steps(cache, config) * config.batch_size, "d_sae": args.d_sae, "k": args.k}
    for name, run in (("saelab", ours), ("saelens", saelens)):
        torch.manual_seed(args.seed)
        started = time.process_time()
        result[name] = {"held_out_fvu": run(cache, config, args.d_sae, args.k), "cpu_s": time.process_time() - started}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

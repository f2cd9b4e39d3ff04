"""Train a TopK SAE with saelab, SAELens and sparsify, each at its own best learning rate, and compare held-out FVU.

    .venv-interop/bin/python -m tests.interop.side_by_side demo/cache --epochs 3
    .venv-interop/bin/python -m tests.interop.side_by_side demo/cache --quick
    .venv-interop/bin/python -m tests.interop.side_by_side demo/cache --defaults --seeds 1 --tools saelens
    .venv-interop/bin/python -m tests.interop.side_by_side mlp/blocks.9.mlp.hook_in --target mlp/blocks.9.hook_mlp_out

With ``--target`` (and ``--skip``) transcoders are trained, which SAELens does not, and FVU is that of the target.

Every tool runs its own trainer with its own defaults, and reads the same batches in the same order. Its learning rate
is tuned in the same way: multiples of the tool's default rate, and beyond them while the best one is at the edge,
compared on validation rows that nobody trains on, with the first seed. Then all seeds train at the best rate. Intervals
are of the difference to saelab, paired by seed and by context of the held-out rows, both of which are resampled.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from sparsify import SparseCoder, SparseCoderConfig, Trainer
from sparsify import TrainConfig as SparsifyConfig
from torch import Tensor, nn

from saelab.data.cache import ActivationCache
from saelab.evaluation.reconstruction import context_of_rows
from saelab.sae import SAE, build
from saelab.training import TrainConfig, n_steps, prepared, train

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
FURTHEST = 64.0  # the largest multiple of a default, and one over the smallest, that is tried
Coder = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows [n, d_in] -> reconstructions and active latents per row


@dataclass(frozen=True)
class Job:
    """What every tool is asked to do. ``config`` holds the batches; its rate and seed are replaced."""

    cache: ActivationCache  # with validation rows
    config: TrainConfig
    d_sae: int
    k: int
    rows: int  # at most so many validation and held-out rows are measured
    skip: bool = False  # of transcoders

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches in saelab's order, with what is reconstructed; they go on for ever."""
        epoch, seed = 0, self.config.data_seed
        while True:
            for batch in self.cache.batches(self.config.batch_size, seed=seed, epoch=epoch, drop_last=True):
                yield batch.acts, batch.acts if batch.target is None else batch.target
            epoch += 1

    def batches(self) -> Iterator[Tensor]:
        """The training batches alone; SAELens draws a few for its scale first."""
        return (acts for acts, _ in self.pairs())

    def build(self) -> SAE:
        """saelab's SAE or transcoder, before training."""
        target = {} if self.cache.target is None else {"d_out": self.cache.target.d_in, "skip": self.skip}
        return build("topk", self.cache.d_in, self.d_sae, k=self.k, **target)


def saelab(job: Job, lr: float | None, seed: int) -> Coder:
    config = TrainConfig(epochs=job.config.epochs, batch_size=job.config.batch_size, seed=seed, lr=lr)
    sae = job.build()
    train(sae, job.cache, config)

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        found = sae.encode(x)
        return sae.reconstruct(x, found), found.nonzero().row_ptr.diff()

    return code


def saelens(job: Job, lr: float | None, seed: int) -> Coder:
    assert lr is not None
    normalise = "expected_average_only_in"
    config = TopKTrainingSAEConfig(d_in=job.cache.d_in, d_sae=job.d_sae, k=job.k, normalize_activations=normalise)
    size = job.config.batch_size
    options: dict[str, Any] = {"n_batches_for_norm_estimate": 20}
    options["lr_end"] = lr / 10  # its schedule is constant, but without this number it stops with an empty error
    settings = SAETrainerConfig(n_steps(job.cache, job.config) * size, size, lr=lr, **options)
    trained: Any = SAETrainer(settings, TopKTrainingSAE(config), job.batches()).fit().eval()
    return lambda x: (trained(x), (trained.encode(x) != 0).sum(1))


class Point(nn.Module):
    """A module that reads one tensor and returns another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Replay(nn.Module):
    """A "language model" for sparsify's trainer: its one module reads and returns cached activations of given rows."""

    def __init__(self, acts: Tensor, target: Tensor) -> None:
        super().__init__()
        self.acts, self.target, self.point, self.device = acts, target, Point(), acts.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.point(self.acts[input_ids].float(), self.target[input_ids].float())


def sparsify(job: Job, lr: float | None, seed: int) -> Coder:
    size, steps = job.config.batch_size, n_steps(job.cache, job.config)
    stream, transcodes = job.pairs(), job.cache.target is not None
    # Sequences of one token, so that any batch size is a whole number of them.
    acts, target = (torch.cat(part) for part in zip(*(next(stream) for _ in range(steps))))
    rows = Dataset.from_dict({"input_ids": torch.arange(len(acts))[:, None].tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = SparsifyConfig(
            SparseCoderConfig(num_latents=job.d_sae, k=job.k, transcode=transcodes, skip_connection=job.skip),
            batch_size=size,
            lr=lr,
            hookpoints=["point"],
            init_seeds=[seed],
            log_to_wandb=False,
            save_dir=folder,
        )
        model: Any = Replay(acts, target)
        Trainer(config, rows, model).fit()
        coder = SparseCoder.load_from_disk(f"{folder}/unnamed/point")  # its averaged weights, which it saves

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        found = coder.encode(x)
        recon = coder.decode(found.top_acts, found.top_indices)
        return recon if coder.W_skip is None else recon + x @ coder.W_skip.mT, (found.top_acts != 0).sum(1)

    return code


def default_rates(job: Job) -> dict[str, float]:
    """The rate that each tool takes if none is given."""
    ours = prepared(job.build(), job.cache, job.config).lr
    assert ours is not None
    return {"saelab": ours, "saelens": SAETrainerConfig(1, 1).lr, "sparsify": 5e-3 / (job.d_sae / 2**14) ** 0.5}


TOOLS = {"saelab": saelab, "saelens": saelens, "sparsify": sparsify}


@torch.no_grad()
def errors(coder: Coder, job: Job, split: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Squared error and squared deviation from the mean of each context, in float64, and the mean L0."""
    found = [(b.acts, b.acts if b.target is None else b.target) for b in job.cache.head(job.rows, split=split)]
    x, goal = (torch.cat(part) for part in zip(*found))
    context = context_of_rows(job.cache, split, len(x)).numpy()
    error, active = [], []
    for part, wanted in zip(x.split(4096), goal.split(4096)):
        recon, count = coder(part)
        error.append((wanted.double() - recon.double()).square().sum(1))
        active.append(count)
    deviation = (goal.double() - goal.double().mean(0)).square().sum(1)
    sums = [np.bincount(context, weights=values.numpy()) for values in (torch.cat(error), deviation)]
    return sums[0], sums[1], torch.cat(active).double().mean().item()


def attempt(tool: str, job: Job, lr: float, seed: int) -> Coder:
    """Train one SAE."""
    torch.manual_seed(seed)
    return TOOLS[tool](job, lr, seed)


def tune(tool: str, job: Job, default: float) -> dict[float, float]:
    """Validation FVU at each rate tried; infinite where training failed."""

    def score(factor: float) -> float:
        try:
            error, deviation, _ = errors(attempt(tool, job, factor * default, seed=0), job, "validation")
        except Exception as reason:  # a tool may stop in any way where a rate is too high
            sys.stderr.write(f"{tool} at {factor * default:.3g}: {reason}\n")
            return float("inf")
        fvu = float(error.sum() / deviation.sum())
        return fvu if np.isfinite(fvu) else float("inf")

    tried = {factor: score(factor) for factor in FACTORS}
    while True:
        best, low, high = min(tried, key=tried.__getitem__), min(tried), max(tried)
        beyond = low / 2 if best == low else high * 2 if best == high else None
        if beyond is None or not 1 / FURTHEST <= beyond <= FURTHEST:
            return {factor * default: fvu for factor, fvu in sorted(tried.items())}
        tried[beyond] = score(beyond)


def difference(ours: np.ndarray, theirs: np.ndarray, deviation: np.ndarray) -> tuple[float, float, float]:
    """Mean difference of FVU, theirs minus ours ``[seeds, contexts]``, and its 95 % interval."""
    generator, draws = np.random.default_rng(0), []
    seeds, contexts = ours.shape
    for _ in range(2000):
        s, c = generator.integers(seeds, size=seeds), generator.integers(contexts, size=contexts)
        draws.append(((theirs - ours)[s][:, c].sum(1) / deviation[c].sum()).mean())
    mean = float(((theirs - ours).sum(1) / deviation.sum()).mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    return mean, float(low), float(high)


def compare(job: Job, tools: list[str], seeds: int, tuning: bool) -> dict[str, Any]:
    """Train every tool with every seed, at its best rate or at its default, and measure."""
    size = job.config.batch_size
    result: dict[str, Any] = {"tokens": n_steps(job.cache, job.config) * size, "d_sae": job.d_sae, "k": job.k}
    defaults, per_context = default_rates(job), {}
    for tool in tools:
        tried = tune(tool, job, defaults[tool]) if tuning else {}
        lr = min(tried, key=tried.__getitem__) if tuning else defaults[tool]
        began, found = time.process_time(), []
        for seed in range(seeds):
            found.append(errors(attempt(tool, job, lr, seed), job, "held_out"))
        seconds = (time.process_time() - began) / seeds
        per_context[tool] = np.stack([error for error, _, _ in found])
        deviation = found[0][1]
        row = {"default_lr": defaults[tool], "tried": {f"{rate:.3g}": fvu for rate, fvu in tried.items()}, "lr": lr}
        row |= {"held_out_fvu": (per_context[tool].sum(1) / deviation.sum()).tolist(), "l0": [f[2] for f in found]}
        row["cpu_s"] = round(seconds, 1)
        if tool != "saelab":
            names = ("difference", "low", "high")
            row |= dict(zip(names, difference(per_context["saelab"], per_context[tool], deviation)))
        result[tool] = row
        sys.stderr.write(f"{tool}: {json.dumps(row)}\n")
    return result


def table(result: dict[str, Any], tools: list[str]) -> str:
    """One line per tool."""
    lines = [f"{'tool':<10}{'default lr':>12}{'lr':>12}{'L0':>7}{'held-out FVU':>14}   worse than saelab by (95 %)"]
    for tool in tools:
        row = result[tool]
        fvu, l0 = np.mean(row["held_out_fvu"]), np.mean(row["l0"])
        behind = "" if tool == "saelab" else f"{row['difference']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
        lines.append(f"{tool:<10}{row['default_lr']:>12.3g}{row['lr']:>12.3g}{l0:>7.2f}{fvu:>14.4f}   {behind}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--target", help="cache of what transcoders reconstruct")
    parser.add_argument("--skip", action="store_true", help="transcoders with a skip connection")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, help="train on the first so many rows only")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=65536, help="validation and held-out rows that are measured")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--defaults", action="store_true", help="each tool at its default rate; nothing is tuned")
    parser.add_argument("--quick", action="store_true", help="one epoch of 32,768 rows, 768 latents, batches of 512")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.tokens, args.d_sae, args.batch_size, args.rows = 1, 32_768, 768, 512, 8192
    cache = ActivationCache(args.cache)
    if args.target is not None:
        cache = cache.with_target(ActivationCache(args.target))
        args.tools = [tool for tool in args.tools if tool != "saelens"]
    cache = cache.with_validation(0.05)
    if args.tokens is not None and args.tokens < cache.n_split("train"):
        shards = cache.shards  # what is not trained on is there to be validated on
        cache = cache.with_validation_from(shards.first_row(shards.context_of(args.tokens)))
    config = TrainConfig(epochs=args.epochs, batch_size=args.batch_size)
    tools = ["saelab", *(tool for tool in args.tools if tool != "saelab")]
    result = compare(Job(cache, config, args.d_sae, args.k, args.rows, args.skip), tools, args.seeds, not args.defaults)
    sys.stdout.write(f"{json.dumps(result, indent=2)}\n{table(result, tools)}\n")


if __name__ == "__main__":
    main()

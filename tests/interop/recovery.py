"""Do SAEs find the features of SAELens' synthetic worlds, which it generates, and scores by its own metrics?

    .venv-interop/bin/python -m tests.interop.recovery
    .venv-interop/bin/python -m tests.interop.recovery --quick

Every seed is another world: features, magnitudes, order of the rows and weights. saelab trains on a cache of its rows
at the default learning rate and writes a run folder, SAELens loads it and scores it on rows that it draws itself. The
trainer of SAELens for the same variant, where it has one that can be asked for an L0, reads the same batches; its
learning rate is chosen on a world of its own (``--tuning-seed``) from multiples of saelab's (``--factors 1``: the same
rate). Both are asked for the L0 of the world's features. Worlds: ``separable`` (orthogonal, independent features) and
``trees`` (parents with mutually exclusive children, correlated, with a bias, more features than dimensions).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from saelab.bench.encoder_start import begin_at
from saelab.data.cache import ActivationCache
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.sae import VARIANTS, build
from saelab.sae.weights import save
from saelab.training import TrainConfig, chosen_rate, n_steps, train

WORLDS = (
    10_000  # added to a world's seed: with the seed of its SAEs, features would be drawn as their first weights are
)
RATES = (0.25, 0.5, 1.0, 2.0)  # multiples of saelab's default rate that SAELens may choose from
PEERS = {
    "topk": "topk",
    "abs_topk": "abstopk",
    "batch_topk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
    "matching_pursuit": "matching_pursuit",
    "jump_relu": "jumprelu",
}
PENALTIES = {"relu", "gated", "jump_relu"}  # asked for an L0; SAELens has a target for jump_relu alone, the only peer
METRICS = ("mcc", "f1", "ev", "l0", "dead")


@dataclass(frozen=True)
class World:
    """A synthetic model, the cache of its rows and what is asked of an SAE."""

    model: SyntheticModel
    cache: ActivationCache
    config: TrainConfig
    d_sae: int
    l0: float
    rows: int  # rows that SAELens scores on
    encoder_start: float | None  # what saelab's encoder begins as: this times the decoder's transpose
    b_dec_at_zero: bool  # saelab's b_dec begins at zero, not at the centre of the rows

    def batches(self) -> Iterator[Tensor]:
        """saelab's training batches in its order; goes on for ever, since SAELens draws a few for its scale first."""
        epoch = 0
        while True:
            for batch in self.cache.batches(
                self.config.batch_size, seed=self.config.data_seed, epoch=epoch, drop_last=True
            ):
                yield batch.acts
            epoch += 1


def world(name: str, seed: int, folder: Path, options: argparse.Namespace) -> World:
    """The synthetic model of SAELens with this seed, and a cache of what it generates."""
    n, d = options.features, options.d_in
    settings: dict[str, Any] = {"num_features": n, "hidden_dim": d, "seed": WORLDS + seed, "std_firing_magnitudes": 0.3}
    if name == "separable":
        settings |= {"num_features": d, "bias": False, "orthogonalization": OrthogonalizationConfig()}
        settings["firing_probability"] = ZipfianFiringProbabilityConfig(0.5, 0.25, 0.04)
    else:
        settings |= {"bias": 1.0, "orthogonalization": OrthogonalizationConfig()}
        settings["hierarchy"] = HierarchyConfig(n // 12, 4, 2, mutually_exclusive_portion=0.5)
        settings["correlation"] = LowRankCorrelationConfig(rank=16, correlation_scale=0.1)
        settings["firing_probability"] = ZipfianFiringProbabilityConfig(0.5, 0.4, 0.06)
    model = SyntheticModel(SyntheticModelConfig(**settings))
    torch.manual_seed(2 * WORLDS + seed)
    with torch.no_grad():
        x, features = zip(*(model.sample_with_features(4096) for _ in range(options.train_rows // 4096)))
    l0 = torch.cat([(part > 0).sum(1) for part in features]).double().mean().item()
    cache = ActivationCache.from_tensors(folder / f"{name}-{seed}", torch.cat(x), held_out=0.1)
    config = TrainConfig(epochs=options.epochs, batch_size=options.batch_size, seed=seed, data_seed=seed,
                         aux_gradient=options.aux_gradient, dead_after=options.dead_after)  # fmt: skip
    start = (options.encoder_start, options.b_dec_at_zero)
    return World(model, cache, config, settings["num_features"], max(1, round(l0)), options.rows, *start)


def score(sae: Any, place: World) -> dict[str, float]:
    """SAELens' own metrics, on fresh rows."""
    torch.manual_seed(7)
    found = eval_sae_on_synthetic_data(
        sae, place.model.feature_dict, place.model.activation_generator, place.rows, batch_size=4096
    )
    values = (found.mcc, found.classification.f1_score, found.explained_variance, found.sae_l0, found.dead_latents)
    return dict(zip(METRICS, map(float, values)))


def ours(variant: str, place: World, folder: Path) -> dict[str, float]:
    """Train with saelab's defaults, export, and let SAELens load and score. ``ev_here`` is saelab's own number."""
    torch.manual_seed(place.config.seed)
    sae = fresh(variant, place)
    begin_at(sae, place.encoder_start, place.b_dec_at_zero)
    train(sae, place.cache, place.config)
    save(sae, folder / variant, {"hook_name": "synthetic", "model_name": "synthetic"})
    theirs = SAE.load_from_disk(folder / variant)
    here = evaluate(sae, place.cache, config=EvaluateConfig(lm_tokens=0)).metrics
    row = score(theirs, place)
    # Both tools' explained variance on the same rows: the held-out ones.
    x = torch.cat([batch.acts for batch in place.cache.head(place.rows, split="held_out")])
    with torch.no_grad():
        theirs_ev = 1 - ((x - theirs(x)).double().square().sum() / (x - x.mean(0)).double().square().sum()).item()
    return row | {"l0_held_out": here["l0"].value, "ev_here": 1 - here["fvu"].value, "ev_there": theirs_ev}


def fresh(variant: str, place: World) -> Any:
    """The variant as its user would ask for it."""
    budget = {"matching_pursuit": "n_steps"}.get(variant, "l0" if variant in PENALTIES else "k")
    return build(variant, place.cache.d_in, place.d_sae, **{budget: place.l0})


def peer(variant: str, place: World, lr: float) -> Any:
    """Train SAELens' class of the same variant with its own trainer on the same batches."""
    cls, config = get_sae_training_class(PEERS[variant])
    options: dict[str, Any] = {}
    if "topk" in PEERS[variant]:
        options["k"] = place.l0
    if variant == "matryoshka":
        options["matryoshka_widths"] = [place.d_sae // 4, place.d_sae // 2, place.d_sae]
    if variant == "matching_pursuit":
        options["max_iterations"] = place.l0
    if variant == "jump_relu":
        options |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(place.l0)}
    steps, size = n_steps(place.cache, place.config), place.config.batch_size
    settings: dict[str, Any] = {"n_batches_for_norm_estimate": 5, "lr_end": lr / 10, "lr_warm_up_steps": steps // 20}
    settings["lr_decay_steps"] = steps // 5
    torch.manual_seed(place.config.seed)
    sae = cls(config(d_in=place.cache.d_in, d_sae=place.d_sae, **options))
    trained: Any = SAETrainer(SAETrainerConfig(steps * size, size, lr=lr, **settings), sae, place.batches()).fit()
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def tuned(variant: str, place: World, factors: Sequence[float]) -> float:
    """SAELens' best multiple of saelab's default rate, by explained variance at about the L0 that was asked for."""
    if len(factors) == 1:
        return factors[0]
    automatic = chosen_rate(fresh(variant, place), place.cache, place.config).value
    tried: dict[float, float] = {}
    for factor in factors:
        found = score(peer(variant, place, factor * automatic), place)
        # A larger code explains more: one that is far above the L0 asked for is no candidate.
        tried[factor] = found["ev"] if found["l0"] < 1.25 * place.l0 else -1.0
    return max(tried, key=tried.__getitem__)


def rows_of(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One row per variant, seed and tool."""
    choices: dict[str, float] = {}
    if options.peers:
        place = world(name, options.tuning_seed, folder, options)
        choices = {variant: tuned(variant, place, options.factors) for variant in options.variants if variant in PEERS}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        place = world(name, seed, folder, options)
        for variant in options.variants:
            common = {"world": name, "seed": seed, "variant": variant, "asked": place.l0}
            yield common | {"tool": "saelab"} | ours(variant, place, folder / f"{name}-{seed}-runs")
            if variant in choices:
                lr = choices[variant] * chosen_rate(fresh(variant, place), place.cache, place.config).value
                found = score(peer(variant, place, lr), place)
                yield common | {"tool": "saelens", "lr": lr, "factor": choices[variant]} | found


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, one line per world and variant, SAELens' in brackets."""
    lines = [
        f"{'world':<10} {'variant':<17}{'asked':>6}{'L0':>7}{'MCC':>17}{'F1':>17}{'EV':>17}{'dead':>13}  EV differs by"
    ]
    for name, variant in dict.fromkeys((row["world"], row["variant"]) for row in rows):
        these = [row for row in rows if (row["world"], row["variant"]) == (name, variant)]
        mine, their = ([row for row in these if row["tool"] == tool] for tool in ("saelab", "saelens"))

        def mean(of: list[dict[str, Any]], key: str) -> float:
            return float(np.mean([row[key] for row in of]))

        def pair(key: str, digits: int, mine: Any = mine, their: Any = their) -> str:
            text = f"{mean(mine, key):.{digits}f}"
            return f"{text} ({mean(their, key):.{digits}f})" if their else text

        apart = max(abs(row["ev_here"] - row["ev_there"]) for row in mine)
        lines.append(
            f"{name:<10} {variant:<17}{mean(mine, 'asked'):>6.1f}{mean(mine, 'l0'):>7.2f}{pair('mcc', 3):>17}"
            f"{pair('f1', 3):>17}{pair('ev', 3):>17}{pair('dead', 0):>13}  {apart:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=["separable", "trees"], choices=["separable", "trees"])
    parser.add_argument(
        "--variants", nargs="+", default=[name for name, cls in VARIANTS.items() if not cls.needs_grads]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--tuning-seed", type=int, default=0)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--d-in", type=int, default=128)
    parser.add_argument("--train-rows", type=int, default=131_072)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--aux-gradient", default="rectified", choices=["rectified", "straight_through"])
    parser.add_argument("--dead-after", type=int, help="tokens; by default the trainer's")
    parser.add_argument(
        "--encoder-start", type=float, help="saelab's encoder begins as the decoder's transpose times this"
    )
    parser.add_argument("--b-dec-at-zero", action="store_true", help="saelab's b_dec begins there, not at the centre")
    parser.add_argument("--rows", type=int, default=32_768, help="rows that SAELens scores on")
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=RATES,
        help="multiples of saelab's rate that SAELens may choose from",
    )
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="train with saelab alone")
    parser.add_argument("--quick", action="store_true", help="one seed of small worlds, saelab alone")
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.peers = 1, False
        options.features, options.d_in, options.train_rows, options.rows = 96, 48, 65_536, 8192
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.worlds:
            for row in rows_of(name, options, Path(folder)):
                rows.append(row)
                sys.stderr.write(json.dumps(row) + "\n")
                if options.out is not None:
                    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()

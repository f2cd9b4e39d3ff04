"""``python -m saelab.bench.overlap``: does the overlap of directions tell how many planted features are active?

BatchTopK SAEs with several k are trained on correlated features with orthogonal directions. For each: the L0 on
held-out samples, ``c_dec``, the n-th decoder projections, and how well the planted directions are recovered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.metrics import decoder_projections, match_dictionary, mean_cosine
from saelab.sae import build
from saelab.training import TrainConfig, n_steps, train

WIDTH = 100  # dimensions


@dataclass(frozen=True)
class Settings:
    """What to train."""

    k: tuple[int, ...] = (3, 6, 8, 10, 11, 12, 14, 17, 21)
    """Active latents per sample."""
    places: tuple[int, ...] = (18, 20, 22)
    """The n of the n-th decoder projections."""
    samples: int = 150_000
    """Samples of the planted world, of which a twentieth is held out."""
    epochs: int = 8
    """Passes over the others, in batches of 512."""
    features: int = 50
    """Features, and latents."""
    out: Path | None = None
    """JSON file to write."""


def world(n: int, seed: int, n_features: int = 50, d_in: int = WIDTH) -> tuple[Tensor, Tensor, float]:
    """Correlated features with orthogonal directions, as in the experiments of arXiv 2508.16560: samples ``[n, d_in]``,
    directions ``[n_features, d_in]``, true L0.

    The features fire together by a Gaussian copula with four common causes, correlations of either sign up to 0.7, with
    probabilities from 0.40 down to 0.05, and magnitudes of 1 with a standard deviation of 0.15.
    """
    from scipy import stats

    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q[:n_features]
    causes = torch.nn.functional.normalize(torch.randn(n_features, 4, generator=generator), dim=1)
    common = torch.randn(n, 4, generator=generator) @ causes.T
    normal = 0.85 * common + (1 - 0.85**2) ** 0.5 * torch.randn(n, n_features, generator=generator)
    cuts = torch.from_numpy(stats.norm.ppf(1 - np.linspace(0.395, 0.05, n_features))).float()
    magnitudes = 1 + 0.15 * torch.randn(n, n_features, generator=generator)
    acts = torch.where(normal > cuts, magnitudes.clamp_min(0), 0.0)
    return acts @ directions, directions, float((acts > 0).sum(1).float().mean())


def results(settings: Settings, cache: ActivationCache, directions: Tensor) -> Iterator[dict[str, Any]]:
    """One row per k."""
    config = TrainConfig(epochs=settings.epochs, batch_size=512, lr=3e-3)
    x = cache.read(cache.spread_rows(8192, "held_out")).acts
    for k in settings.k:
        torch.manual_seed(0)
        sae = build("batch_topk", cache.d_in, settings.features, k=k)
        train(sae, cache, config)
        with torch.no_grad():
            code = sae.encode(x)
            overlap = decoder_projections(x, sae.W_dec, sae.b_dec, settings.places)
        yield {
            "k": k,
            "steps": n_steps(cache, config),
            "l0": float((code.values != 0).sum()) / code.n,
            "c_dec": mean_cosine(sae.W_dec),
            "projections": dict(zip(settings.places, overlap)),
            "recovered": match_dictionary(sae.W_dec, directions).mean_cosine,
        }


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print the table, and the k at which each number is best."""
    settings = command.options(Settings, "overlap", __doc__, args)
    console = Console(highlight=False)
    if settings.features > WIDTH:
        raise UserError(f"--features {settings.features}: {WIDTH} dimensions hold that many orthogonal ones at most")
    x, directions, truth = world(settings.samples, seed=1, n_features=settings.features)
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache.from_tensors(Path(folder) / "cache", x, held_out=0.05)
        rows = list(results(settings, cache, directions))
    console.print(f"true L0 {truth:.2f}, {rows[0]['steps']} steps")
    table = Table("k", "L0", "c_dec", *(f"projection {n}" for n in settings.places), "recovered")
    for row in rows:
        numbers = (row["l0"], row["c_dec"], *row["projections"].values(), row["recovered"])
        table.add_row(str(row["k"]), *(f"{number:.4g}" for number in numbers))
    console.print(table)
    lowest = [min(rows, key=lambda r: r["c_dec"])["k"]]
    lowest += [min(rows, key=lambda r, n=n: r["projections"][n])["k"] for n in settings.places]
    console.print(f"lowest at k = {lowest}; best recovered at {max(rows, key=lambda r: r['recovered'])['k']}")
    write_out(settings.out, rows)
    return rows


if __name__ == "__main__":
    command.run(main)

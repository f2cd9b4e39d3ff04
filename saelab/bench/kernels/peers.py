"""Time the steps of other libraries on one batch; run by the interpreter of an environment that has them.

``python peers.py WHAT N D_IN D_SAE K ROUNDS``, with ``topk`` or ``pursuit`` for WHAT, prints one JSON object: per
library and version the median milliseconds of a step and of the bare encode product in the same rounds. That
environment need not have saelab: the clock is loaded by its path. A library that is not installed is left out.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], object]


def adam_step(module: torch.nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sparsify(x: Tensor, d_sae: int, k: int) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=k))
    return adam_step(coder, lambda: coder(x).fvu)


def dictionary_learning(x: Tensor, d_sae: int, k: int) -> Step:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(10_000, x.shape[1], d_sae, k, layer=0, lm_name="none", lr=1e-4, seed=0, device="cpu")
    trainer.update(0, x)
    return lambda: trainer.update(1, x)


def sae_lens_step(sae, x: Tensor) -> Step:
    from sae_lens.saes.sae import TrainStepInput

    given = TrainStepInput(x, {}, None, 1, False)
    return adam_step(sae, lambda: sae.training_forward_pass(given).loss)


def sae_lens(x: Tensor, d_sae: int, k: int) -> Step:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k))
    return sae_lens_step(sae, x)


def sae_lens_abs(x: Tensor, d_sae: int, k: int) -> Step:
    from sae_lens import AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig

    return sae_lens_step(AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k)), x)


def pursuit(x: Tensor, d_sae: int, k: int):
    """SAELens' class, configured to always take ``k`` steps, like ours."""
    from sae_lens import MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig

    config = MatchingPursuitTrainingSAEConfig(
        d_in=x.shape[1], d_sae=d_sae, max_iterations=k, residual_threshold=0.0, stop_on_duplicate_support=False
    )
    return MatchingPursuitTrainingSAE(config)


def pursuit_training(x: Tensor, d_sae: int, k: int) -> Step:
    return sae_lens_step(pursuit(x, d_sae, k), x)


def pursuit_evaluation(x: Tensor, d_sae: int, k: int) -> Step:
    sae = pursuit(x, d_sae, k)

    def step() -> None:
        with torch.no_grad():
            (sae.decode(sae.encode(x)) - x).square().sum()

    return step


Make = Callable[[Tensor, int, int], Step]
# what is timed -> name -> (distribution, module, how it is made)
PEERS: dict[str, dict[str, tuple[str, str, Make]]] = {
    "topk": {
        "sparsify": ("eai-sparsify", "sparsify", sparsify),
        "dictionary_learning": ("dictionary-learning", "dictionary_learning", dictionary_learning),
        "SAELens TopK": ("sae-lens", "sae_lens", sae_lens),
        "SAELens AbsTopK": ("sae-lens", "sae_lens", sae_lens_abs),
    },
    "pursuit": {
        "training": ("sae-lens", "sae_lens", pursuit_training),
        "evaluation": ("sae-lens", "sae_lens", pursuit_evaluation),
    },
}


def new_clock() -> Any:
    """The clock of all benchmarks, without the package it is in."""
    spec = spec_from_file_location("timing", Path(__file__).parents[1] / "timing.py")
    assert spec is not None
    assert spec.loader is not None
    timing = module_from_spec(spec)
    spec.loader.exec_module(timing)
    return timing.Clock()


def main(what: str, n: int, d_in: int, d_sae: int, k: int, rounds: int) -> dict[str, dict[str, float | str]]:
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(1))
    W, product = torch.randn(d_sae, d_in).T, torch.empty(n, d_sae)
    found = {}
    for name, (distribution, module, make) in PEERS[what].items():
        if find_spec(module) is None:
            continue
        step = make(x, d_sae, k)
        clock = new_clock()
        clock.rounds({"gemm": lambda: torch.mm(x, W, out=product), "step": step}, rounds)
        found[name] = {
            "package": f"{distribution} {version(distribution)}",
            "gemm": 1e3 * clock.median("gemm").wall,
            "milliseconds": 1e3 * clock.median("step").wall,
        }
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # libraries print on import
        figures = main(sys.argv[1], *(int(argument) for argument in sys.argv[2:7]))
    sys.stdout.write(json.dumps(figures) + "\n")

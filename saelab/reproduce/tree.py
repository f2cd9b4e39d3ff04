"""Matching pursuit and its rivals on the hierarchical tree benchmark (Costa et al., 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from saelab.data.synthetic import Magnitudes, Tree
from saelab.metrics import absorption_cosine, correlation_errors, match_dictionary
from saelab.reproduce.toys import BATCH, BETAS, LR, Kind, Toys, fit, schedule
from saelab.sae import SAE, build

RESIDUAL_STOP = 0.05
N_TEST = 5000


@dataclass(frozen=True)
class TreeScore:
    """What one replica learned: recovery of the planted directions, and its errors on fresh samples."""

    mean_cosine: float
    absorption: float
    flat_mse: float
    hierarchical_mse: float
    fvu: float
    l0: float

    def content(self) -> dict[str, float]:
        return asdict(self)


def pursuit(seed: int, norm: str = "free", n_steps: int = 8) -> SAE:
    """The benchmark's matching pursuit: 20 atoms, no offset; a sample ends at a small residual or a repeated atom."""
    torch.manual_seed(seed)
    return build(
        "matching_pursuit",
        d_in=20,
        d_sae=20,
        n_steps=n_steps,
        residual_stop=RESIDUAL_STOP,
        stop_on_repeat=True,
        norm=norm,
        revive_weight=0.0,
        use_b_dec=False,
    )


def fit_pursuit(sae: SAE, tree: Tree, steps: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Train on the published recipe: see :mod:`saelab.reproduce.toys`; the loss is the squared error, nothing else."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in sae.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS, fused=True)
    sae.train()
    chunk = tree.sample(BATCH * 50, generator)[0]
    for step in range(steps):
        at = step % 50
        if at == 0 and step:
            chunk = tree.sample(BATCH * 50, generator)[0]
        x = chunk[at * BATCH : (at + 1) * BATCH]
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, steps)
        loss = (x - sae.decode(sae.encode(x))).square().sum() / BATCH
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        sae.normalise_decoder()
        sae.project_decoder_grad()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        sae.after_step(step + 1, steps)
        if progress is not None and step % 100 == 99:
            progress(100)
    sae.eval()


@torch.no_grad()
def score(W_dec: Tensor, recon: Tensor, l0: float, x: Tensor, tree: Tree) -> TreeScore:
    """Compare a dictionary and its reconstruction of fresh samples with the tree."""
    matching = match_dictionary(W_dec, tree.directions)
    flat, across = correlation_errors(W_dec, tree.directions, tree.groups, tree.levels, matching)
    fvu = float((x - recon).double().square().sum() / (x - x.mean(0)).double().square().sum())
    absorbed = absorption_cosine(W_dec, tree.directions, tree.parents, matching)
    return TreeScore(matching.mean_cosine, absorbed, flat, across, fvu, l0)


@torch.no_grad()
def score_pursuit(sae: SAE, tree: Tree, seed: int) -> TreeScore:
    """Score a trained matching pursuit on samples it has not seen."""
    x, _ = tree.sample(N_TEST, torch.Generator().manual_seed(10_000 + seed))
    code = sae.encode(x)
    return score(sae.W_dec, sae.decode(code), float(code.l0().double().mean()), x, tree)


def run_pursuit(tree: Tree, seed: int, steps: int, norm: str = "free") -> TreeScore:
    """Train and score one replica."""
    sae = pursuit(seed, norm)
    fit_pursuit(sae, tree, steps, seed)
    return score_pursuit(sae, tree, seed)


def run_toys(kind: Kind, trees: Sequence[Tree], seeds: Sequence[int], steps: int) -> list[TreeScore]:
    """Train one baseline on all trees at once, and score each replica."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample(n: int) -> Tensor:
        return torch.stack([tree.sample(n, g)[0] for tree, g in zip(trees, generators)])

    toys = Toys(kind, len(trees), seed=seeds[0])
    fit(toys, sample, steps)
    tests = [tree.sample(N_TEST, torch.Generator().manual_seed(10_000 + s))[0] for tree, s in zip(trees, seeds)]
    z = toys.codes(torch.stack(tests))
    recon = (z @ toys.W_dec + toys.b_dec).detach()
    l0 = (z != 0).sum(2).double().mean(1).tolist()
    return [score(toys.W_dec[i], recon[i], l0[i], tests[i], tree) for i, tree in enumerate(trees)]


def child_magnitudes(mean: float, sd: float = 0.25) -> Magnitudes:
    """The setting of the absorption table: parents N(1, 0.25^2), children N(mean, sd^2)."""
    return Magnitudes(parent_mean=1.0, parent_sd=0.25, child_mean=mean, child_sd=sd)

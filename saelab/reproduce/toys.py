"""The SAEs of the tree benchmark as its authors ran them: dense, tiny, all replicas in one batched product.

Replicas (seeds and settings) stand in the first dimension: ``W_enc [r, d, n]``, ``W_dec [r, n, d]``. Four kinds:
``vanilla`` (ReLU with an L1 penalty), ``matryoshka`` (the same over random nested prefixes), ``batch_topk``, and
``pursuit``: :class:`saelab.sae.matching_pursuit.MatchingPursuit` with free norms and without an offset, where a sample
ends at a residual below 0.05 or with the second choice of an atom; the tests hold both to the same codes.

The recipe is that of Costa et al. (2025) and of their published code: Adam, lr 3e-2, betas (0.5, 0.9375), gradient norm
clipped to 1, 100 warm-up steps, the last 20 % falling linearly to a tenth. Encoders start from normal deviates, of
variance 1/d where there is a penalty and 1 for ``batch_topk``, decoders from their normalised columns, at a norm of 0.1
where there is a penalty; nothing is subtracted from the input. The penalty is on ``z_j |d_j|``; it starts at 0.1, ramps
over the first 20 % of the steps, then moves by 3e-4 per step towards the target L0. Of a nested SAE the error and the
penalty are means over the prefixes, each prefix with the penalty of all its latents. Prefixes are drawn without
replacement, P(length) ~ sqrt(length) - sqrt(length - 1), and latents are ordered by an EMA (0.95) of their squared
contribution. Two things differ, which were measured to matter little: Adam's moments move with their latents when the
order changes, and the input is not rescaled by a running mean of its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["vanilla", "matryoshka", "batch_topk", "pursuit"]
LR, BETAS, BATCH, STEPS = 3e-2, (0.5, 0.9375), 200, 15_000
TARGET_L0 = 1.36
OWN = 1 << 20  # added to a seed for what an SAE draws itself
PURSUIT_STEPS, RESIDUAL_STOP = 20, 0.05  # steps: as many as dimensions, which samples hardly reach


def schedule(step: int, steps: int) -> float:
    """The published factor on the learning rate: warm up, stay, fall to a tenth."""
    warm = min(1.0, (step + 1) / min(100, max(steps // 10, 1)))
    left = (steps - step) / (0.2 * steps)
    return warm * (1.0 if left >= 1 else 0.1 + 0.9 * left)


class Toys(nn.Module):
    """Independent autoencoders of one kind, one per seed: each draws its weights and prefixes from its own."""

    def __init__(self, kind: Kind, seeds: Sequence[int], d: int = 20, n: int = 20, n_prefixes: int = 5) -> None:
        super().__init__()
        # Other seeds than those of the trees, whose first draws are matrices of the same shape.
        r, self.generators = len(seeds), [torch.Generator().manual_seed(OWN + seed) for seed in seeds]
        W = torch.stack([torch.randn(n, d, generator=generator) for generator in self.generators])
        unit = W / W.norm(dim=2, keepdim=True)
        penalised = kind in ("vanilla", "matryoshka")
        self.W_dec = nn.Parameter(0.1 * unit if penalised else unit)
        self.W_enc = nn.Parameter((W / d**0.5 if penalised else W).mT.clone())
        self.b_enc = nn.Parameter(torch.zeros(r, 1, n))
        self.b_dec = nn.Parameter(torch.zeros(r, 1, d))
        self.kind, self.n_prefixes = kind, n_prefixes if kind == "matryoshka" else 1
        self.penalty = torch.full((r,), 0.1)
        self.contribution = torch.zeros(r, n)
        self.threshold = torch.zeros(r, 1, 1)

    def pre_acts(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc + self.b_enc)

    def loss(self, x: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Loss of each replica ``[r]``, and its code ``[r, batch, n]``."""
        if self.kind == "pursuit":
            z, residual = self._pursue(x)
            return residual.square().sum(2).mean(1), z
        z = self.pre_acts(x)
        if self.kind == "batch_topk":
            z = self._keep_largest(z, 3.0 if step < 1000 * steps // STEPS else TARGET_L0)
            return (x - z @ self.W_dec - self.b_dec).square().sum(2).mean(1), z
        contribution = z * self.W_dec.norm(dim=2)[:, None]
        ramp = min(1.0, (step + 1) / (0.2 * steps))
        prefixes = self._prefixes()
        with torch.no_grad():
            self.contribution.lerp_(contribution.square().mean(1), 0.05)
        penalties = (prefixes * contribution.mean(1)[:, None]).sum(2).mean(1)
        errors = [(x - (z * kept[:, None]) @ self.W_dec - self.b_dec).square().sum(2).mean(1)
                  for kept in prefixes.unbind(1)]  # fmt: skip
        return torch.stack(errors).mean(0) + ramp * self.penalty * penalties, z

    @torch.no_grad()
    def _prefixes(self) -> Tensor:
        """Which latents each prefix of each replica holds, ``[r, n_prefixes, n]``; the last one holds all."""
        r, n = self.contribution.shape
        if self.n_prefixes == 1:
            return torch.ones(r, 1, n, dtype=torch.bool)
        lengths = torch.arange(n, dtype=torch.float32)
        law = lengths[1:].sqrt() - lengths[:-1].sqrt()
        drawn = [law.multinomial(self.n_prefixes - 1, generator=generator) + 1 for generator in self.generators]
        ends = torch.cat([torch.stack(drawn), torch.full((r, 1), n)], dim=1)
        rank = self.contribution.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank[:, None] < ends[..., None]

    def _pursue(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and final residuals; the gradient passes through all coefficients and residuals, not the argmax."""
        residual, z = x, x.new_zeros(*x.shape[:2], self.W_dec.shape[1])
        alive = torch.ones(x.shape[:2], dtype=torch.bool)
        for _ in range(PURSUIT_STEPS):
            alive = alive & (residual.detach().norm(dim=2) > RESIDUAL_STOP)
            if not alive.any():
                break
            best = (residual @ self.W_dec.mT).detach().argmax(2, keepdim=True)
            atom = self.W_dec.gather(1, best.expand(-1, -1, x.shape[2]))
            value = (residual * atom).sum(2, keepdim=True).relu() * alive[..., None]
            # The second choice of an atom still counts; the sample ends with it, or where nothing is left to take.
            alive = alive & (z.gather(2, best) == 0)[..., 0] & (value > 0)[..., 0]
            z = z.scatter_add(2, best, value)
            residual = residual - value * atom
        return z, residual

    def _keep_largest(self, z: Tensor, k: float) -> Tensor:
        flat = z.flatten(1)
        cut = flat.topk(int(k * z.shape[1]) + 1, dim=1).values[:, -1]
        with torch.no_grad():
            self.threshold.lerp_(cut[:, None, None], 0.1 if self.threshold.any() else 1.0)
        return z * (z >= cut[:, None, None]) * (z > 0)

    @torch.no_grad()
    def adapt(self, z: Tensor, step: int, steps: int) -> None:
        """Move the penalty towards the target L0, once its ramp is over."""
        if self.kind in ("vanilla", "matryoshka") and step >= 0.2 * steps:
            dense = (z != 0).sum(2).float().mean(1) >= TARGET_L0
            self.penalty *= torch.where(dense, 1 + 3e-4 * STEPS / steps, 1 - 3e-4 * STEPS / steps)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Inference: the threshold for ``batch_topk``, pursuit for ``pursuit``, plain ReLU for the others."""
        if self.kind == "pursuit":
            return self._pursue(x)[0]
        z = self.pre_acts(x)
        return z * (z > self.threshold) if self.kind == "batch_topk" else z


def clip_each(parameters: Sequence[Tensor], max_norm: float = 1.0) -> None:
    """Clip the gradient norm of every replica by itself: they are separate runs."""
    squares = sum(p.grad.flatten(1).square().sum(1) for p in parameters if p.grad is not None)
    factor = (max_norm / (torch.as_tensor(squares).sqrt() + 1e-6)).clamp_max(1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))


def train_toys(toys: Toys, sample: Callable[[int], Tensor], steps: int = STEPS) -> None:
    """Train all replicas; ``sample(n)`` gives ``[r, n, d]``."""
    parameters = list(toys.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS, fused=True)
    chunk = sample(BATCH * 50)
    for step in range(steps):
        at = step % 50
        if at == 0 and step:
            chunk = sample(BATCH * 50)
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, steps)
        loss, z = toys.loss(chunk[:, at * BATCH : (at + 1) * BATCH], step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        clip_each(parameters)
        optimizer.step()
        toys.adapt(z, step, steps)

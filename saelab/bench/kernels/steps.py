"""Training steps the benchmark compares: ours, plain dense autograd, and the step structures of other libraries.

The structures are written from what those libraries compute, not from their code: which products, which copies, which
gradients. ``--peers-python`` times the packages themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab import kernels

Step = Callable[[], object]


class Parameters:
    """One SAE and its optimizer; the encoder column-major for us, row-major for the others."""

    def __init__(self, d_in: int, d_sae: int, device: str, column_major: bool = True, fused: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        directions = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1).to(device)
        self.W_dec = directions.clone().requires_grad_()
        W_enc = directions.clone().T
        self.W_enc = (W_enc if column_major else W_enc.contiguous()).requires_grad_()
        self.b_enc = torch.zeros(d_sae, device=device, requires_grad=True)
        self.b_dec = torch.zeros(d_in, device=device, requires_grad=True)
        optimizer = kernels.Adam if fused else torch.optim.Adam
        self.optimizer = optimizer(self.all(), lr=1e-4, fused=fused or None)

    def all(self) -> list[Tensor]:
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]

    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.W_enc, self.b_enc, self.b_dec

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def ours(p: Parameters, x: Tensor, k: int, per_batch: bool = False, signed: bool = False) -> Step:
    def step() -> None:
        if per_batch:
            selected = kernels.select_batch(x, *p.encoder(), budget=k * x.shape[0], signed=signed)
        else:
            selected = kernels.select_topk(x, *p.encoder(), k=k, signed=signed)
        values = kernels.pre_acts_at(x, *p.encoder(), selected)
        sse, _ = kernels.sse(x, values, selected.indices, selected.row_ptr, p.W_dec, p.b_dec)
        p.update(sse.sum() / x.shape[0])

    return step


def dense(p: Parameters, x: Tensor, k: int) -> Step:
    """Everything as a dense matrix, all gradients by autograd."""

    def step() -> None:
        pre_acts = (x - p.b_dec) @ p.W_enc + p.b_enc
        top = pre_acts.topk(k, dim=1)
        acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
        p.update((acts @ p.W_dec + p.b_dec - x).square().sum() / x.shape[0])

    return step


class _RowGradient(torch.autograd.Function):
    """Top values of a dense ReLU layer; the backward pass builds one vector per (token, winner) and scatters them."""

    @staticmethod
    def forward(ctx, x, W, b, k):  # pyright: ignore
        acts = F.relu(F.linear(x, W, b))
        values, indices = acts.topk(k, dim=1, sorted=False)
        ctx.save_for_backward(x, W, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices, acts

    @staticmethod
    def backward(ctx, grad, _, __):  # pyright: ignore
        x, W, indices = ctx.saved_tensors
        flat = indices.reshape(-1)
        d_x = F.embedding_bag(indices, W, mode="sum", per_sample_weights=grad)
        d_b = torch.zeros(W.shape[0], device=x.device).index_add_(0, flat, grad.reshape(-1))
        rows = (grad[:, :, None] * x[:, None, :]).reshape(-1, x.shape[1])
        return d_x, torch.zeros_like(W).index_add_(0, flat, rows), d_b, None


def row_scatter(p: Parameters, x: Tensor, k: int) -> Step:
    """The structure of sparsify: a dense product, embedding-bag decoding, gradients scattered row by row."""

    def step() -> None:
        values, indices, _ = _RowGradient.apply(x - p.b_dec, p.W_enc.T, p.b_enc, k)  # pyright: ignore
        recon = F.embedding_bag(indices, p.W_dec, mode="sum", per_sample_weights=values) + p.b_dec
        p.update((recon - x).square().sum() / x.shape[0])

    return step


def pursuit(p: Parameters, x: Tensor, n_steps: int, train: bool) -> Step:
    def step() -> None:
        with torch.set_grad_enabled(train):
            code = kernels.pursuit(x, p.W_dec, p.b_dec, n_steps)
            sse, _ = kernels.sse(x, code.values, code.indices, code.row_ptr, p.W_dec, p.b_dec)
        if train:
            p.update(sse.sum() / x.shape[0])

    return step


def dense_pursuit(p: Parameters, x: Tensor, n_steps: int, train: bool) -> Step:
    """The structure of SAELens: one product per step, a dense code, and its support compared after every step."""

    def step() -> None:
        with torch.set_grad_enabled(train):
            residual = x - p.b_dec
            acts = residual.new_zeros(x.shape[0], p.W_dec.shape[0])
            support = acts.detach() != 0
            for _ in range(n_steps):
                with torch.no_grad():
                    best = (residual @ p.W_dec.T).relu().argmax(1)
                atoms = p.W_dec[best]
                value = (residual * atoms).sum(1).relu()
                acts = acts.scatter_add(1, best[:, None], value[:, None])
                residual = residual - value[:, None] * atoms
                now = acts.detach() != 0
                (now == support).all(1)
                support = now
            loss = (acts @ p.W_dec + p.b_dec - x).square().sum() / x.shape[0]
        if train:
            p.update(loss)

    return step

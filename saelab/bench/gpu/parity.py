"""Every selection and every gradient on the device against dense float64 definitions there, at a size of real use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab import kernels

GRADIENT = 1e-4  # relative error of a gradient's norm; float32 sums of thousands of terms are an order better


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel forgets to write is NaN, or a huge index, not what luck left there."""
    real = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(math.nan)
            return tensor.fill_(2**40 if tensor.dtype == torch.int64 else 119)

        return allocate

    torch.empty, torch.empty_like, torch.Tensor.new_empty = map(fill, real)  # pyright: ignore
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = real  # pyright: ignore


class Problem:
    """Gaussian activations, unit directions, and the pre-activations in float64 with the rounding error of float32."""

    def __init__(self, n: int, d_in: int, d_sae: int, k: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.k = k
        self.W_dec = F.normalize(normal(d_sae, d_in), dim=1)
        self.W_enc = (self.W_dec + 0.02 * normal(d_sae, d_in)).T
        self.x, self.grads = normal(n, d_in), normal(n, d_in)
        self.b_enc, self.b_dec = 0.1 * normal(d_sae), 0.1 * normal(d_in)
        centred = self.x.double() - self.b_dec.double()
        self.z = centred @ self.W_enc.double() + self.b_enc.double()
        size = centred.abs() @ self.W_enc.abs().double() + self.b_enc.abs().double()
        self.error = 2 * d_in * torch.finfo(torch.float32).eps * size

    @property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.W_enc, self.b_enc, self.b_dec

    def chosen(self, code: kernels.SelectedPreActs) -> Tensor:
        """Which (token, latent) a code holds. ValueError where one is held twice."""
        rows = torch.repeat_interleave(code.row_ptr.diff())
        mask = torch.zeros(self.z.shape, dtype=torch.bool, device=self.z.device)
        mask[rows, code.indices] = True
        if int(mask.sum()) != code.indices.numel():
            raise ValueError("a latent is held twice")
        return mask


def _largest(key: Tensor, error: Tensor, chosen: Tensor, dim: int) -> bool:
    """Whether nothing that was left out is surely larger than something that was taken, along ``dim``."""
    left = (key - error).masked_fill(chosen, -math.inf).amax(dim)
    taken = (key + error).masked_fill(~chosen, math.inf).amin(dim)
    return bool((left <= taken).all())


def selections(p: Problem, signed: bool) -> dict[str, bool]:
    """Whether each kind of selection takes the right latents."""
    key, (n, d_sae) = (p.z.abs() if signed else p.z), p.z.shape
    found: dict[str, bool] = {}
    chosen = p.chosen(kernels.select_topk(*p.encoder, k=p.k, signed=signed))
    found["topk"] = bool((chosen.sum(1) == p.k).all()) and _largest(key, p.error, chosen, 1)
    chosen = p.chosen(kernels.select_batch(*p.encoder, budget=n * p.k, signed=signed)).view(1, -1)
    found["batch"] = int(chosen.sum()) == n * p.k and _largest(key.view(1, -1), p.error.view(1, -1), chosen, 1)
    budgets = torch.randint(0, n + 1, (d_sae,), generator=torch.Generator().manual_seed(1)).to(p.x.device)
    chosen = p.chosen(kernels.select_latent(*p.encoder, budgets=budgets, signed=signed))
    found["latent"] = bool((chosen.sum(0) == budgets).all()) and _largest(key, p.error, chosen, 0)
    chosen = p.chosen(kernels.select_threshold(*p.encoder, threshold=1.5, signed=signed))
    wrong = (chosen & (key + p.error <= 1.5)) | (~chosen & (key - p.error > 1.5))
    found["threshold"] = not bool(wrong.any())
    code = kernels.select_gradient_topk(p.x, p.grads, *p.encoder[1:], p.W_dec, p.k, 1.0, "rms", signed)
    effect = (p.grads.double() @ p.W_dec.double().T).abs()
    score = (p.z.abs() if signed else p.z.relu()) * (1 + effect / effect.square().mean().sqrt())
    found["gradient_topk"] = _largest(score, 1e-3 * (1 + score), p.chosen(code), 1)
    return {f"{name} {'signed' if signed else 'relu'}": right for name, right in found.items()}


def gradients(p: Problem) -> dict[str, float]:
    """Relative error of the gradient of the loss by each tensor, and of a latent that every token takes."""
    found = {}
    popular = p.b_enc.clone()
    popular[17 % len(popular)] = 50.0
    for name, b_enc in (("", p.b_enc), (", with a latent that every token takes", popular)):
        mine = [t.detach().clone().requires_grad_() for t in (p.x, p.W_enc, b_enc, p.b_dec, p.W_dec)]
        x, W_enc, bias, b_dec, W_dec = mine
        code = kernels.select_topk(x, W_enc, bias, b_dec, p.k)
        values = kernels.pre_acts_at(x, W_enc, bias, b_dec, code)
        kernels.sse(x, values, code.indices, code.row_ptr, W_dec, b_dec)[0].sum().backward()
        theirs = [t.detach().double().requires_grad_() for t in mine]
        x, W_enc, bias, b_dec, W_dec = theirs
        acts = torch.where(p.chosen(code), ((x - b_dec) @ W_enc + bias).relu(), 0.0)
        (acts @ W_dec + b_dec - x).square().sum().backward()
        for what, a, b in zip(("x", "W_enc", "b_enc", "b_dec", "W_dec"), mine, theirs):
            assert a.grad is not None
            assert b.grad is not None
            found[f"gradient of {what}{name}"] = float((a.grad.double() - b.grad).norm() / b.grad.norm())
    return found


def repeats(p: Problem, times: int = 3) -> list[str]:
    """What differs between equal steps; nothing may, or a resumed run is not that of an uninterrupted one."""
    seen: dict[str, Tensor] = {}
    moved = set()
    for _ in range(times):
        mine = [t.detach().clone().requires_grad_() for t in (p.x, p.W_enc, p.b_enc, p.b_dec, p.W_dec)]
        x, W_enc, b_enc, b_dec, W_dec = mine
        code = kernels.select_topk(x, W_enc, b_enc, b_dec, p.k)
        values = kernels.pre_acts_at(x, W_enc, b_enc, b_dec, code)
        sse, recon = kernels.sse(x, values, code.indices, code.row_ptr, W_dec, b_dec)
        sse.sum().backward()
        grads = {name: t.grad for name, t in zip(("x", "W_enc", "b_enc", "b_dec", "W_dec"), mine)}
        for name, tensor in {"indices": code.indices, "values": values.detach(), "recon": recon, **grads}.items():
            if tensor is not None and not torch.equal(seen.setdefault(name, tensor.clone()), tensor):
                moved.add(name)
    return sorted(moved)


def wide(device: torch.device, n: int, d_sae: int, k: int) -> bool:
    """Selection where the pre-activations have more than 2^31 entries: row offsets must not wrap around."""
    x, W = torch.randn(n, 16, device=device), torch.randn(d_sae, 16, device=device).T
    code = kernels.select_topk(x, W, None, None, k)
    rows = torch.tensor([0, n // 2, n - 1], device=device)
    z = x[rows].double() @ W.double()
    mask = torch.zeros_like(z, dtype=torch.bool).scatter(1, code.indices.view(n, k)[rows], True)
    error = 32 * torch.finfo(torch.float32).eps * (x[rows].abs().double() @ W.abs().double())
    return bool((mask.sum(1) == k).all()) and _largest(z, error, mask, 1)


def check(backend: str, device: torch.device, size: tuple[int, int, int, int], huge: bool) -> dict[str, Any]:
    """All of it; ``red`` lists what is wrong."""
    problem = Problem(*size, device)
    with poisoned(), kernels.use_backend(backend):
        right = {**selections(problem, False), **selections(problem, True)}
        errors, moved = gradients(problem), repeats(problem)
        if huge:
            right["more than 2^31 pre-activations"] = wide(device, 16_640, 131_072, 64)
    red = [name for name, ok in right.items() if not ok]
    red += [f"{name}: relative error {error:.1e}" for name, error in errors.items() if not error < GRADIENT]
    red += [f"{name} differs between equal steps" for name in moved]
    return {"backend": backend, "size": size, "red": red, "gradient errors": errors}

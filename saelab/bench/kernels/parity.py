"""Parity checks before a speed is printed: the backend must agree with float64 on the edge cases."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab import kernels
from saelab.kernels.cases import CASES, Case, random_case


def large() -> Case:
    """Large enough for what only large selections do."""
    return random_case(256, 64, 16_384, 16)


def red_cases(backend: str, device: str) -> list[str]:
    """Names and reasons of the cases on which ``backend`` differs from float64 beyond rounding."""
    found = []
    for name, make in {**CASES, "large": large}.items():
        for signed in (False, True):
            reason = _difference(make(), backend, device, signed)
            if reason:
                found.append(f"{name} ({'signed' if signed else 'relu'}): {reason}")
    return found


def _difference(case: Case, backend: str, device: str, signed: bool) -> str | None:
    mine, theirs = (_leaves(case.to(*where)) for where in ((device,), (torch.float64,)))
    k = case.k
    terms = case.x.shape[1] + max(case.k, case.x.shape[0])
    rounding = 4 * terms * torch.finfo(case.x.dtype).eps
    with kernels.use_backend(backend):
        selected = kernels.select_topk(*mine.encoder, k=k, signed=signed)
        values = kernels.pre_acts_at(*mine.encoder, selected)
        sse, _ = kernels.sse(mine.x, values, selected.indices, selected.row_ptr, mine.W_dec, mine.b_dec)
    indices = selected.indices.cpu().view(-1, k)
    x, W_enc, b_enc, b_dec = theirs.encoder
    z = (x if b_dec is None else x - b_dec) @ W_enc
    z = z if b_enc is None else z + b_enc
    key = z.detach().abs() if signed else z.detach()
    chosen = torch.zeros(key.shape, dtype=torch.bool).scatter(1, indices, True)
    if not bool((chosen.sum(1) == k).all()):
        return "an index appears twice"
    worst, missed = key.masked_fill(~chosen, torch.inf).amin(1), key.masked_fill(chosen, -torch.inf).amax(1)
    if bool((missed - worst > rounding * key[key.isfinite()].abs().max()).any()):
        return "a larger pre-activation was left out"
    code = torch.where(chosen, z if signed else z.relu(), 0.0)
    if not bool(code.isfinite().all()):
        return None
    expected = (code @ theirs.W_dec + (0 if b_dec is None else b_dec) - x).square().sum(1)
    sse.sum().backward()
    expected.sum().backward()
    pairs = [("loss", sse, expected)]
    for name, a, b in zip(Case._fields, mine, theirs):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.grad is not None and b.grad is not None:
            pairs.append((f"gradient of {name}", a.grad, b.grad))
    if len(pairs) != 1 + sum(isinstance(t, Tensor) for t in case):
        return "a tensor has no gradient"
    for what, a, b in pairs:
        scale = max(1.0, float(b.detach().abs().max()))
        if not bool(((a.detach().cpu().double() - b.detach()).abs() <= rounding * scale).all()):
            return what
    return None


def _leaves(case: Case) -> Case:
    return Case(*(t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in case))  # pyright: ignore

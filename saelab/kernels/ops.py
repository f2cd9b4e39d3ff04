"""The public ops: selection without gradient, then differentiable values, decoding and loss.

Shapes: ``x [n, d_in]``, ``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``;
a bias may be None; all of one floating dtype on one device. Memory layout is free, but a column-major ``W_enc`` is
the fast one, and its gradient has that layout. The order of entries within a row is not part of the contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saelab.kernels import candidates, checks, gradients
from saelab.kernels.by_latent import ByLatent, RowSums
from saelab.kernels.dispatch import implementation
from saelab.kernels.gradients import detached
from saelab.kernels.precision import rounds
from saelab.kernels.products import centred, split
from saelab.kernels.reference.backend import Effect, Ragged


class SelectedPreActs(NamedTuple):
    """A ragged selection: ``values [nnz]``, ``indices [nnz]``, ``row_ptr [n + 1]``."""

    values: Tensor
    indices: Tensor
    row_ptr: Tensor


@torch.no_grad()
def select_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    signed: bool = False,
    clip: bool = True,
) -> SelectedPreActs:
    """Per token the ``k`` largest pre-activations (magnitudes when ``signed``, sign kept).

    Unsigned values are clipped at zero, unless ``clip`` is False: a surplus winner is stored as 0. NaN ranks as
    ``-inf``; ties go to the lowest latent.
    """
    checks.encoder(x, W_enc, b_enc, b_dec)
    checks.budget(k, W_enc.shape[1], "k", "d_sae")
    operands: Any = detached(x, W_enc, b_enc, b_dec)
    if not rounds(x):
        return _selected(x, implementation(x).topk(*operands, k, signed, clip=clip))
    ops, halves = _rounded(*operands)
    found = ops.topk(*halves, candidates.surplus(k, W_enc.shape[1]), signed)
    return _selected(x, candidates.best_per_token(_encoder(operands), found, k, signed, clip=clip))


@torch.no_grad()
def select_gradient_topk(
    x: Tensor,
    grads: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    k: int,
    beta: float,
    grad_norm: Literal["rms", "none"] = "rms",
    signed: bool = False,
) -> SelectedPreActs:
    """Per token the ``k`` largest of ``relu(z) * (1 + beta * |grads @ W_dec^T| / norm)``; the value is ``z``.

    ``grads [n, d_out]`` has the width of ``W_dec [d_sae, d_out]``. ``norm`` is the root mean square of ``grads @
    W_dec^T`` over batch and latents, or 1. ``beta=0`` is TopK, ``beta=math.inf`` ranks by ``relu(z) * |grads @
    W_dec^T|`` alone. With ``signed``, ``|z|`` replaces ``relu(z)``.
    """
    checks.encoder(x, W_enc, b_enc, b_dec)
    checks.matrices(grads, W_dec, W_dec.shape[-1], "W_dec")
    checks.like(x, grads=grads)
    checks.budget(k, W_enc.shape[1], "k", "d_sae")
    if grads.shape[0] != x.shape[0] or W_dec.shape[0] != W_enc.shape[1]:
        raise ValueError(
            f"grads {list(grads.shape)} must have the rows of x {list(x.shape)}, and W_dec {list(W_dec.shape)} a row "
            f"for each latent of W_enc {list(W_enc.shape)}"
        )
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be 0 or more (math.inf ranks by the gradient term alone)")
    if grad_norm not in ("rms", "none"):
        raise ValueError(f"grad_norm={grad_norm!r} is neither 'rms' nor 'none'")
    operands: Any = detached(x, W_enc, b_enc, b_dec)
    effect = _effect(grads.detach(), W_dec.detach(), beta, grad_norm)
    if not rounds(x):
        return _selected(x, implementation(x).topk(*operands, k, signed, effect))
    half = effect._replace(grads=effect.grads.bfloat16(), W_dec=effect.W_dec.bfloat16())
    count = candidates.surplus(k, W_enc.shape[1])
    ops, halves = _rounded(*operands)
    found = ops.topk(*halves, count, signed, half)
    return _selected(x, candidates.best_per_token(_encoder(operands), found, k, signed, effect))


@torch.no_grad()
def select_batch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool = False
) -> SelectedPreActs:
    """The ``budget`` largest pre-activations of the whole batch; ties go to the lowest (token, latent)."""
    checks.encoder(x, W_enc, b_enc, b_dec)
    checks.budget(budget, x.shape[0] * W_enc.shape[1], "budget", "n * d_sae")
    operands: Any = detached(x, W_enc, b_enc, b_dec)
    if not rounds(x):
        return _selected(x, implementation(x).batch(*operands, budget, signed))
    count = candidates.surplus(budget, x.shape[0] * W_enc.shape[1])
    ops, halves = _rounded(*operands)
    found = ops.batch(*halves, count, signed)
    return _selected(x, candidates.best_of_batch(_encoder(operands), found, budget, signed))


@torch.no_grad()
def select_latent(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    budgets: Tensor,
    signed: bool = False,
    sizes: tuple[int, int] | None = None,
) -> SelectedPreActs:
    """Per latent ``j`` its ``budgets[j]`` largest pre-activations over the batch (``budgets [d_sae]``, int64).

    A budget above n takes all tokens; ties go to the lowest token. ``sizes`` is the sum of the budgets, none of them
    above n, and a bound on the largest: where the caller knows these, a GPU is not waited for.
    """
    checks.encoder(x, W_enc, b_enc, b_dec)
    if budgets.dtype != torch.int64 or list(budgets.shape) != [W_enc.shape[1]] or budgets.device != x.device:
        raise ValueError(
            f"budgets must be int64 [{W_enc.shape[1]}] on {x.device}, got {budgets.dtype} {list(budgets.shape)}"
        )
    n = x.shape[0]
    checks.latent_budgets(budgets, n, sizes)
    budgets = budgets.clamp(0, n if sizes is None else min(n, sizes[1]))
    operands: Any = detached(x, W_enc, b_enc, b_dec)
    if not rounds(x):
        return _selected(x, implementation(x).latent(*operands, budgets, signed, sizes))
    ops, halves = _rounded(*operands)
    more, room = candidates.surplus_per_latent(budgets, n, sizes)
    found = ops.latent(*halves, more, signed, room)
    total = None if sizes is None else sizes[0]
    return _selected(x, candidates.best_per_latent(_encoder(operands), found, budgets, signed, total))


@torch.no_grad()
def select_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor | float,
    signed: bool = False,
) -> SelectedPreActs:
    """Pre-activations strictly above ``threshold`` (a number or ``[d_sae]``); magnitudes when ``signed``."""
    checks.encoder(x, W_enc, b_enc, b_dec)
    if isinstance(threshold, Tensor) and threshold.numel() not in (1, W_enc.shape[1]):
        raise ValueError(f"threshold has shape {list(threshold.shape)}, expected a number or [{W_enc.shape[1]}]")
    cut = torch.as_tensor(threshold, dtype=x.dtype, device=x.device).detach().reshape(-1).expand(W_enc.shape[1])
    operands: Any = detached(x, W_enc, b_enc, b_dec)
    if not rounds(x):
        return _selected(x, implementation(x).threshold(*operands, cut, signed))
    slack = candidates.slack(centred(x, b_dec), W_enc)
    ops, halves = _rounded(*operands)
    found = ops.threshold(*halves, cut, signed, slack)
    if found is not None:
        return _selected(x, candidates.above(_encoder(operands), found, cut, signed))
    halves = split(centred(x, b_dec), W_enc)
    return _selected(x, implementation(halves[0]).threshold(*halves, b_enc, None, cut, signed))


def pre_acts_at(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    selected: SelectedPreActs,
    by: ByLatent | None = None,
) -> Tensor:
    """The selected values, differentiable in ``x``, ``W_enc``, ``b_enc`` and ``b_dec``. Returns ``[nnz]``.

    ``selected`` must come from a ``select_*`` op on the same arguments: its values are taken as they are. A value of
    zero did not fire and passes no gradient. ``by`` sorts the code for the gradients; one that is shared with the other
    ops on the same code sorts once.
    """
    checks.encoder(x, W_enc, b_enc, b_dec)
    checks.code(*selected, W_enc.shape[1])
    _check_rows(x, selected.row_ptr)
    by = by or ByLatent(*selected[1:], W_enc.shape[1])
    return gradients.PreActsAt.apply(x, W_enc, b_enc, b_dec, *_contiguous(selected), by)  # pyright: ignore


def decode(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    by: ByLatent | None = None,
) -> Tensor:
    """``dense(code) @ W_dec + b_dec``, differentiable in ``values``, ``W_dec`` and ``b_dec``. ``[n, d_in]``."""
    _check_decoder(values, indices, row_ptr, W_dec, b_dec)
    by = by or ByLatent(indices, row_ptr, W_dec.shape[0])
    return gradients.Decode.apply(*_contiguous((values, indices, row_ptr)), W_dec, b_dec, by)  # pyright: ignore


def sse(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    by: ByLatent | None = None,
) -> tuple[Tensor, Tensor]:
    """Per token ``sum((decode(code) - x)^2)``, and the reconstruction it belongs to, without gradient.

    Returns ``([n], [n, d_in])``; differentiable in ``x``, ``values``, ``W_dec`` and ``b_dec``. This is the training
    loss: residual and value gradients come out of the same visit to the decoder's rows as the reconstruction.
    """
    checks.matrices(x, W_dec, W_dec.shape[-1], "W_dec")
    _check_decoder(values, indices, row_ptr, W_dec, b_dec)
    _check_rows(x, row_ptr)
    by = by or ByLatent(indices, row_ptr, W_dec.shape[0])
    return gradients.SquaredError.apply(x, *_contiguous((values, indices, row_ptr)), W_dec, b_dec, by)  # pyright: ignore


def reconstruct(
    x: Tensor,
    encoder: tuple[Tensor, Tensor | None, Tensor | None],
    decoder: tuple[Tensor, Tensor | None],
    selected: SelectedPreActs,
    by: ByLatent | None = None,
    sums: RowSums | None = None,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`pre_acts_at`, then :func:`sse`: per token the squared error, the reconstruction, and the code's values.

    ``encoder`` is ``(W_enc, b_enc, b_in)`` and ``decoder`` ``(W_dec, b_dec)``. The error is that of ``target [n,
    d_out]``, where it is given, in which it is differentiable, and else of ``x``. The backward pass takes the gradients
    of both matrices and of ``b_enc`` together. With ``sums``, which it fills where the backend does so, the gradient of
    ``W_dec`` comes without the part along each of its rows. Returns ``([n], [n, d_out], [nnz])``.
    """
    (W_enc, b_enc, b_in), (W_dec, b_dec) = encoder, decoder
    checks.encoder(x, W_enc, b_enc, b_in)
    if target is None:
        checks.matrices(x, W_dec, W_dec.shape[-1], "W_dec")
    _check_decoder(*selected, W_dec, b_dec)
    _check_rows(x, selected.row_ptr)
    if target is not None:
        checks.matrices(target, W_dec, W_dec.shape[-1], "W_dec")
        _check_rows(target, selected.row_ptr)
    by = by or ByLatent(*selected[1:], W_dec.shape[0])
    weights = W_enc, b_enc, b_in, W_dec, b_dec
    return gradients.Reconstruct.apply(x, target, *weights, *_contiguous(selected), by, sums)  # pyright: ignore


def pursuit(
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    n_steps: int,
    residual_stop: float = 0.0,
    stop_on_repeat: bool = False,
) -> SelectedPreActs:
    """Matching pursuit on a tied dictionary: ``n_steps`` times the atom with the largest product with the residual.

    A token stops early once its residual's norm is at most ``residual_stop``, once no product is positive, or, with
    ``stop_on_repeat``, after it has taken an atom again. An atom taken again has one entry, the sum. The values are
    differentiable in ``x``, ``W_dec`` and ``b_dec`` through the whole chain of residuals (Costa et al., 2025).
    """
    checks.matrices(x, W_dec, W_dec.shape[-1], "W_dec", b_dec=(b_dec, W_dec.shape[-1]))
    checks.budget(n_steps, 1 << 30, "n_steps", "2**30")
    if not residual_stop >= 0:
        raise ValueError(f"residual_stop={residual_stop} must be 0 or more")
    return SelectedPreActs(*gradients.Pursuit.apply(x, W_dec, b_dec, n_steps, residual_stop, stop_on_repeat))  # pyright: ignore


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> bool:
    """``out[i] = source[rows[i]]``, widened to float32; whether all of it is finite. On the CPU, without gradient.

    ``source [m, d]`` is contiguous and float16, bfloat16 or float32; ``rows [n]`` int64, within ``0 .. m``; ``out [n,
    d]`` contiguous float32. Where it is not all finite, ``out`` is undefined in place of the non-finite numbers.
    """
    if source.dtype not in checks.STORED or out.dtype != torch.float32 or rows.dtype != torch.int64:
        raise TypeError(f"cannot gather {source.dtype} rows into {out.dtype} by {rows.dtype} numbers")
    if out.shape != (rows.numel(), source.shape[-1]) or not (source.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"{rows.numel()} rows of {list(source.shape)} do not fit a contiguous {list(out.shape)}")
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < source.shape[0]):
        raise ValueError(f"rows span {int(rows.min())}..{int(rows.max())}, outside 0..{source.shape[0] - 1}")
    return implementation(out, strict=False).gather_rows(source, rows, out)


def _effect(grads: Tensor, W_dec: Tensor, beta: float, grad_norm: str) -> Effect:
    """The score ``a * (w0 + w1 * |grads @ W_dec^T|)``; a norm that is measured goes into ``grads``, unread."""
    if math.isinf(beta):
        return Effect(grads, W_dec, (0.0, 1.0))
    if grad_norm == "none" or beta == 0:
        return Effect(grads, W_dec, (1.0, beta))
    # sum over (i, j) of (g_i . w_j)^2 = <G^T G, W^T W>: two small products instead of one of n * d_sae * d_in.
    wide = torch.promote_types(grads.dtype, torch.float32)
    with torch.autocast(grads.device.type, enabled=False):
        small = [grads.T.to(wide) @ grads.to(wide), W_dec.T.to(wide) @ W_dec.to(wide)]
    if grads.device.type == "mps":  # which has no float64
        small = [product.cpu() for product in small]
    mean_square = (small[0].double() * small[1].double()).sum() / max(grads.shape[0] * W_dec.shape[0], 1)
    unit = torch.where(mean_square > 0, mean_square.rsqrt(), 0.0)
    return Effect(grads * unit.to(grads), W_dec, (1.0, beta))


def _check_decoder(values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> None:
    checks.matrices(W_dec, W_dec, W_dec.shape[-1], "W_dec", b_dec=(b_dec, W_dec.shape[-1]))
    checks.code(values, indices, row_ptr, W_dec.shape[0])
    if values.device != W_dec.device:
        raise ValueError(f"the code is on {values.device} but W_dec is on {W_dec.device}; move one of them")


def _check_rows(x: Tensor, row_ptr: Tensor) -> None:
    if row_ptr.numel() != x.shape[0] + 1:
        raise ValueError(f"the code has {row_ptr.numel() - 1} rows but x has {x.shape[0]}")


def _contiguous(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _selected(x: Tensor, found: Ragged) -> SelectedPreActs:
    values, indices, row_ptr = found
    return SelectedPreActs(values.to(x.dtype), indices, row_ptr)


def _encoder(operands: Sequence[Any]) -> candidates.Encoder:
    return candidates.Encoder(implementation(operands[0]), *operands)


def _rounded(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> tuple[ModuleType, list[Any]]:
    """The backend for the product's operands in bfloat16, and these in the place of ``x, W_enc, b_enc, b_dec``.

    Centring happens before rounding, since activations may lie far from the origin; biases are added in float32.
    """
    half = centred(x, b_dec).bfloat16()
    return implementation(half), [half, W_enc.bfloat16(), b_enc, None]

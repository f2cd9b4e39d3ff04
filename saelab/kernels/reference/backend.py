"""The definition of each op in plain PyTorch, which is also the test oracle and the fallback.

Every other backend is an optimisation of a function in this file. Shapes: ``x [n, d_in]``,
``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``; a ragged code is the triple
``values [nnz]``, ``indices [nnz]``, ``row_ptr [n + 1]`` of :class:`saelab.sparse.SparseCode`. Selection compares keys:
the pre-activation itself, or its magnitude when ``signed``; NaN ranks as ``-inf``, ties go to the lowest index.
Nothing here builds ``[n, d_sae]``: the product is taken in chunks of rows into one buffer that is used again.
Selections from operands in half precision compare, and return, float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.kernels.products import centred, pre_act_chunks
from saelab.kernels.ragged import pointers, row_ids
from saelab.kernels.reference.pursuit import pursue, pursue_backward  # noqa: F401

Ragged = tuple[Tensor, Tensor, Tensor]

# Entries whose decoder rows are gathered at a time where the gather is materialised.
GATHER = 1 << 14


class Effect(NamedTuple):
    """What ranks latents besides their pre-activations: how much each would change the loss.

    The keys become ``a * (w0 + w1 * |grads @ W_dec^T|)``, ``a`` being the rectified or absolute pre-activation.
    """

    grads: Tensor  # [n, d_in]
    W_dec: Tensor  # [d_sae, d_in]
    weights: tuple[float, float]


class Slack(NamedTuple):
    """How far below the threshold an entry is still taken: ``rows[i] * latents[j]``."""

    rows: Tensor  # [n]
    latents: Tensor  # [d_sae]
    most: float  # share of all entries above which nothing is taken


def topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    signed: bool,
    effect: Effect | None = None,
    clip: bool = True,
) -> Ragged:
    """Per token the ``k`` latents with the largest keys. With ``clip``, winners below zero are stored as 0."""
    values, indices = [], []
    for start, acts in pre_act_chunks(x, W_enc, b_enc, b_dec):
        if effect is None:
            key = ranked(acts, signed)
        else:
            size = (effect.grads[start : start + acts.shape[0]] @ effect.W_dec.T).to(acts.dtype).abs_()
            score = size.mul_(effect.weights[1]).add_(effect.weights[0])
            key = ranked(score.mul_(acts.abs() if signed else acts.relu()), signed=False)
        chosen = largest(key, k)
        values.append(_output(acts.gather(1, chosen), signed or not clip))
        indices.append(chosen)
    row_ptr = torch.arange(x.shape[0] + 1, device=x.device) * k
    return torch.cat(values).reshape(-1), torch.cat(indices).reshape(-1), row_ptr


def batch(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool) -> Ragged:
    """The ``budget`` largest pre-activations of the whole batch; ties go to the lowest (token, latent)."""
    d_sae = W_enc.shape[1]
    keys, flat, values = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device), x.new_empty(0)
    for start, acts in pre_act_chunks(x, W_enc, b_enc, b_dec):
        chunk = acts.reshape(-1)
        kept = largest_of_row(ranked(chunk, signed), min(budget, chunk.numel()))
        keys = torch.cat([keys, ranked(chunk[kept], signed)])
        values = torch.cat([values, _output(chunk[kept], signed)])
        flat = torch.cat([flat, kept + start * d_sae])
        best = largest_of_row(keys, min(budget, keys.numel()))
        keys, values, flat = keys[best], values[best], flat[best]
    return values, flat % d_sae, pointers(torch.bincount(flat // d_sae, minlength=x.shape[0]))


def latent(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    budgets: Tensor,
    signed: bool,
    sizes: tuple[int, int] | None = None,
) -> Ragged:
    """Per latent ``j`` its ``budgets[j]`` largest pre-activations over the batch.

    ``sizes`` are bounds on their sum and on the largest, for backends that would have to wait for these.
    """
    top = int(budgets.max()) if budgets.numel() else 0
    rows, columns, values = [], [], []
    for start, acts in pre_act_chunks(W_enc.T, centred(x, b_dec).T, None, None):  # acts [latents, n]
        stop = start + acts.shape[0]
        if b_enc is not None:
            acts += b_enc[start:stop, None]
        order = _descending(ranked(acts, signed))[:, :top]
        chosen = torch.arange(top, device=x.device) < budgets[start:stop, None]
        latents = torch.arange(start, stop, device=x.device)[:, None].expand_as(order)
        rows.append(order[chosen])
        columns.append(latents[chosen])
        values.append(_output(acts.gather(1, order)[chosen], signed))
    row = torch.cat(rows)
    by_row = row.argsort(stable=True)
    return torch.cat(values)[by_row], torch.cat(columns)[by_row], pointers(torch.bincount(row, minlength=x.shape[0]))


def threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    cut: Tensor | float,
    signed: bool,
    slack: Slack | None = None,
) -> Ragged | None:
    """Pre-activations whose key is strictly above ``cut`` (a number or ``[d_sae]``), unclipped.

    With ``slack`` also those that are short of it by no more; None if that is more than a share ``slack.most`` of all.
    """
    values, indices, counts = [], [], []
    for start, acts in pre_act_chunks(x, W_enc, b_enc, b_dec):
        key = acts.abs() if signed else acts
        if slack is not None:
            key = key + slack.rows[start : start + acts.shape[0], None] * slack.latents
        mask = key > cut
        if slack is not None and int(mask.sum()) > slack.most * mask.numel():
            return None
        values.append(acts[mask])
        indices.append(mask.nonzero(as_tuple=True)[1])
        counts.append(mask.sum(1))
    return torch.cat(values), torch.cat(indices), pointers(torch.cat(counts))


def decode(values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """``dense(code) @ W_dec + b_dec`` without the dense code. Returns ``[n, d_in]``."""
    weights = values.to(W_dec.dtype)
    recon = F.embedding_bag(indices, W_dec, row_ptr, mode="sum", per_sample_weights=weights, include_last_offset=True)
    return recon if b_dec is None else recon.add_(b_dec)


def value_grad(grad: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor) -> Tensor:
    """The gradient of each stored value: ``grad[row] . W_dec[index]``. Returns ``[nnz]``."""
    rows, out = row_ids(row_ptr, indices.numel()), grad.new_empty(indices.numel())
    for start in range(0, indices.numel(), GATHER):
        part = slice(start, start + GATHER)
        out[part] = (grad[rows[part]] * W_dec[indices[part]]).sum(1)
    return out


def decode_error(
    x: Tensor, values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(sse [n], recon [n, d_in], error = recon - x, error[row] . W_dec[index] [nnz])``."""
    recon = decode(values, indices, row_ptr, W_dec, b_dec)
    error = recon - x
    return error.square().sum(1), recon, error, value_grad(error, indices, row_ptr, W_dec)


class Sorted(NamedTuple):
    """The entries of a code ordered by latent, and by token within a latent."""

    order: Tensor  # [nnz], entry numbers
    rows: Tensor  # [nnz], their tokens
    ptr: Tensor  # [d_sae + 1]: latent j owns ptr[j] : ptr[j + 1]
    latents: Tensor | None = None  # [nnz], where the backend uses it


class LatentGrads(NamedTuple):
    """Gradients by latent; see :func:`latent_grads`."""

    dec: Tensor | None  # [d_sae, d_in]
    enc: Tensor | None  # [d_sae, d_in]
    bias: Tensor | None  # [d_sae]
    scale: Tensor | None = None  # [d_sae]: one over the norm of each row of W_dec
    squares: Tensor | None = None  # [d_sae]: sums of squares of those asked for, of the bias only beside both matrices


def by_latent(indices: Tensor, row_ptr: Tensor, d_sae: int) -> Sorted:
    order = indices.argsort(stable=True)
    rows = row_ids(row_ptr, indices.numel())[order]
    return Sorted(order, rows, pointers(torch.bincount(indices, minlength=d_sae)))


def latent_grads(
    by: Sorted,
    values: Tensor,
    weight: Tensor | None = None,
    along: Tensor | None = None,
    extra: Tensor | None = None,
    error: Tensor | None = None,
    x: Tensor | None = None,
    offset: Tensor | None = None,
    W_dec: Tensor | None = None,
    measure: bool = False,
) -> LatentGrads:
    """The gradients of a latent's dictionary row, encoder vector and bias, in one pass over the code's entries.

    With entries ``e`` of latent j in token order: ``dec[j] = sum of values_e * weight[row] * error[row]``, where
    ``error`` is given; ``enc[j] = sum of g_e * (x[row] - offset)`` and ``bias[j] = sum of g_e``, where ``x`` is given.
    ``g_e = along_e * weight[row] + extra_e`` is the gradient of a value, 0 where the value is 0 and did not fire;
    what is None counts as 1 (``weight``) or 0. With ``W_dec`` the part of ``dec[j]`` along its row is removed, and
    ``scale`` and ``squares`` are filled, where the backend does it on the way. With ``measure`` and no ``error``
    ``squares`` are those of ``enc`` alone, there.
    """
    values = values[by.order]
    each = 1.0 if weight is None else weight[by.rows]
    dec = enc = bias = None
    if error is not None:
        dec = decode(values * each, by.rows, by.ptr, error, None)
    if x is not None:
        g = entry_grads(values, each, *(None if part is None else part[by.order] for part in (along, extra)))
        enc = decode(g, by.rows, by.ptr, x if offset is None else x - offset, None)
        bias = decode(g, by.rows, by.ptr, x.new_ones(x.shape[0], 1), None)[:, 0]
    return LatentGrads(dec, enc, bias)


def entry_grads(values: Tensor, each: Tensor | float, along: Tensor | None, extra: Tensor | None) -> Tensor:
    """``g`` of :func:`latent_grads`; ``each`` is the weight of each entry's token."""
    g = torch.zeros_like(values) if along is None else along * each
    if extra is not None:
        g = extra if along is None else g + extra
    # A winner that ReLU clipped to zero did not fire: without the mask it would be trained all the same.
    return g * (values != 0)


def largest(key: Tensor, k: int) -> Tensor:
    """Per row the indices ``[n, k]`` of the ``k`` largest keys, none of them NaN; ties go to the lowest index."""
    # torch.topk leaves the order of ties open, so only its values are trusted: rows whose k-th value also occurs
    # outside the winners are settled by a stable sort.
    indices = key.topk(k, dim=1).indices
    last = key.gather(1, indices[:, -1:])
    open_rows = (key >= last).sum(1) > k
    if bool(open_rows.any()):
        indices[open_rows] = _descending(key[open_rows])[:, :k]
    return indices


def largest_of_row(key: Tensor, count: int) -> Tensor:
    """Ascending positions of the ``count`` largest entries of ``key [m]``."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=key.device)
    last = key.topk(count).values[-1]
    above, level = (key > last), (key == last).nonzero().squeeze(1)
    above[level[: count - int(above.sum())]] = True
    return above.nonzero().squeeze(1)


def _descending(key: Tensor) -> Tensor:
    return key.sort(dim=1, descending=True, stable=True).indices


def ranked(acts: Tensor, signed: bool) -> Tensor:
    """The comparison key of each pre-activation."""
    return torch.where(acts.isnan(), float("-inf"), acts.abs() if signed else acts)


def _output(acts: Tensor, signed: bool) -> Tensor:
    return acts if signed else acts.relu()


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> bool:
    """``out[i] = source[rows[i]]`` in float32, for CPU tensors; whether all of it is finite.

    ``source [m, d]`` is contiguous and float16, bfloat16 or float32, ``rows [n]`` int64 within it, ``out [n, d]``
    contiguous. Where it is not all finite, what ``out`` holds in place of the non-finite numbers is undefined.
    """
    out.copy_(source.index_select(0, rows))
    return bool(out.isfinite().all())

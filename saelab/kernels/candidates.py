"""The best of a selection's candidates, by pre-activations that are computed for them alone, in float32.

A product with rounded operands finds the candidates, more than are wanted: :func:`surplus`. Where a budget is spent
nothing waits for the GPU: all sizes are known, and positions come from running sums.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from saelab.kernels.precision import use_precision
from saelab.kernels.products import centred
from saelab.kernels.ragged import pointers, row_ids, row_pointers
from saelab.kernels.reference.backend import Effect, Ragged, Slack, ranked

DENSE = 0.01  # share of all entries above which computing single ones takes longer than a product


class Encoder(NamedTuple):
    """The operands of a pre-activation, and the backend that computes single ones."""

    ops: ModuleType
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None

    def at(self, indices: Tensor, row_ptr: Tensor) -> Tensor:
        """The pre-activations of a ragged selection, ``[nnz]``."""
        z = self.dots(centred(self.x, self.b_dec), self.W_enc.T, indices, row_ptr)
        return z if self.b_enc is None else z.add_(self.b_enc[indices])

    def dots(self, rows: Tensor, latents: Tensor, indices: Tensor, row_ptr: Tensor) -> Tensor:
        """``rows [n, d_in] @ latents [d_sae, d_in].T`` at the entries of a selection, in float32."""
        with use_precision("fp32"):
            return self.ops.value_grad(rows.contiguous(), indices, row_ptr, latents)


def surplus(count: int, most: int) -> int:
    """How many candidates to take for ``count`` winners: a quarter more, and at least eight, as far as there are.

    docs/kernels.md says how often that loses a winner.
    """
    return min(count + max(8, count // 4), most)


def surplus_per_latent(budgets: Tensor, n: int, sizes: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int] | None]:
    """How many candidates each latent takes; bounds on their sum and on the most, where ``sizes`` has the budgets'."""
    more = (budgets + (budgets // 4).clamp_min(8)).clamp_max(n) * (budgets > 0)
    if sizes is None:
        return more, None
    total, most = sizes
    at_most = total + total // 4 + 8 * min(total, budgets.numel())
    return more, (min(at_most, n * budgets.numel()), min(n, most + max(8, most // 4)))


def slack(x: Tensor, W: Tensor) -> Slack:
    """By how much rounding to bfloat16 can lower a pre-activation of ``x [n, d_in]`` with ``W [d_in, d_sae]``.

    Each rounded factor is off by ``2^-9`` of itself at most, and sums of d_in products by as many roundings of float32,
    here and where the candidates are computed.
    """
    reach = 2.0**-8 * (1 + 2.0**-8) + 4 * x.shape[1] * 2.0**-24
    norms = torch.linalg.vector_norm
    return Slack(reach * norms(x, dim=1), norms(W, dim=0), DENSE)


def best_per_token(
    encoder: Encoder, found: Ragged, k: int, signed: bool, effect: Effect | None = None, clip: bool = True
) -> Ragged:
    """The ``k`` best of each token's candidates, of which all tokens have equally many."""
    _, indices, row_ptr = found
    n = row_ptr.numel() - 1
    shape = n, indices.numel() // max(n, 1)
    if not getattr(encoder.ops, "ASCENDING", False):  # ties go to the lowest latent
        indices = indices.view(shape).sort(dim=1).values.flatten()
    values = encoder.at(indices, row_ptr)
    keys = ranked(values, signed)
    if effect is not None:
        size = encoder.dots(effect.grads, effect.W_dec, indices, row_ptr).abs_()
        score = size.mul_(effect.weights[1]).add_(effect.weights[0])
        keys = ranked(score.mul_(values.abs() if signed else values.relu()), signed=False)
    chosen = keys.view(shape).sort(dim=1, descending=True, stable=True).indices[:, :k]
    values, indices = (entries.view(shape).gather(1, chosen).flatten() for entries in (values, indices))
    return _clipped(values, signed or not clip), indices, torch.arange(n + 1, device=indices.device) * k


def best_of_batch(encoder: Encoder, found: Ragged, budget: int, signed: bool) -> Ragged:
    """The ``budget`` best of all candidates, which are in ascending order of token and latent."""
    _, indices, row_ptr = found
    values = encoder.at(indices, row_ptr)
    best = positions_of_largest(ranked(values, signed), budget)
    rows = row_ids(row_ptr, indices.numel())[best]
    return _clipped(values[best], signed), indices[best], row_pointers(rows, row_ptr.numel() - 1)


def best_per_latent(encoder: Encoder, found: Ragged, budgets: Tensor, signed: bool, total: int | None = None) -> Ragged:
    """The ``budgets[j]`` best candidates of each latent ``j``, or all of them if there are fewer.

    With ``total``, the sum of the budgets, of which none asks for more than there are, nothing waits for the GPU; what
    lies behind the last row of ``found`` is then no candidate.
    """
    _, indices, row_ptr = found
    values, n, d_sae = encoder.at(indices, row_ptr), row_ptr.numel() - 1, budgets.numel()
    place = torch.arange(indices.numel(), device=indices.device)
    rows, real = torch.searchsorted(row_ptr, place, right=True).sub_(1), place < row_ptr[-1]
    names = torch.where(real, indices, d_sae)  # a latent behind the last, without a budget
    order = torch.where(real, ranked(values, signed), -torch.inf).argsort(descending=True, stable=True)
    order = order[names[order].argsort(stable=True)]  # by latent, the best first
    latents = names[order]
    rank = place - row_pointers(latents, d_sae)[latents]
    wanted = rank < torch.cat([budgets, budgets.new_zeros(1)])[latents]
    if total is None:
        kept = order[wanted].sort().values
    else:
        every = torch.arange(1, total + 1, dtype=torch.int32, device=order.device)
        kept = order[torch.searchsorted(wanted.cumsum(0, dtype=torch.int32), every)].sort().values
    return _clipped(values[kept], signed), indices[kept], row_pointers(rows[kept], n)


def above(encoder: Encoder, found: Ragged, cut: Tensor, signed: bool) -> Ragged:
    """The candidates whose pre-activation (its magnitude when ``signed``) is above ``cut [d_sae]``, unclipped."""
    _, indices, row_ptr = found
    values = encoder.at(indices, row_ptr)
    keep = (values.abs() if signed else values) > cut[indices]
    running = pointers(keep)
    return values[keep], indices[keep], running[row_ptr]


def positions_of_largest(keys: Tensor, count: int) -> Tensor:
    """Ascending positions of the ``count`` largest of ``keys [m]``, none of them NaN; ties go to the lowest."""
    if count == 0 or count >= keys.numel():
        return torch.arange(min(count, keys.numel()), device=keys.device)
    last = keys.topk(count, sorted=False).values.amin()
    better, level = keys > last, keys == last
    taken = better | (level & (level.cumsum(0, dtype=torch.int32) <= count - better.sum()))
    wanted = torch.arange(1, count + 1, dtype=torch.int32, device=keys.device)
    return torch.searchsorted(taken.cumsum(0, dtype=torch.int32), wanted)


def _clipped(values: Tensor, signed: bool) -> Tensor:
    return values if signed else values.relu_()

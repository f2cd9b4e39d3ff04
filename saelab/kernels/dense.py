"""Codes that are not sparse: decoding and gradients as products of dense matrices, one chunk of tokens at a time.

An entry of a sparse code costs the traffic of gathered rows, one of a dense code only arithmetic. Above a share of
active latents a chunk of the code is written out, multiplied, and what belongs to its entries is picked from the
result. The choice depends on the number of entries, which is known where they were allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.kernels.precision import in_halves
from saelab.kernels.products import (
    CHUNK_BYTES,
    DEVICE_CHUNK_BYTES,
    chunk_rows,
    split_left,
    split_right,
    wide_product,
)
from saelab.kernels.ragged import row_ids
from saelab.kernels.reference.backend import LatentGrads, Sorted, entry_grads

LEAST = 1 << 20  # entries of a dense code below which nothing is gained


class Unsorted(NamedTuple):
    """Stands for the entries by latent where gradients are dense products, which need no order."""

    indices: Tensor
    row_ptr: Tensor
    d_sae: int
    halves: bool


class DenseOrSparse:
    """The functions on ragged codes of a backend, which are dense products where the code is not sparse.

    ``sparse`` has the functions for sparse codes. ``fill(values, indices, row_ptr, out)`` writes the entries of the
    rows of ``out [rows, d_sae]``, and ``pick(dense, indices, row_ptr, out)`` reads them from ``dense`` into ``out
    [nnz]``; ``row_ptr`` begins with these rows. ``share`` is the share of active latents from which a code is dense:
    with float32 products, and under ``True`` with products of split bfloat16 operands, where the backend has them.
    """

    def __init__(
        self, sparse: Any, fill: Callable[..., None], pick: Callable[..., None], share: Mapping[bool, float]
    ) -> None:
        self.sparse, self.fill, self.pick, self.share = sparse, fill, pick, dict(share)

    def halves(self, like: Tensor) -> bool:
        """Whether products are of split bfloat16 operands in this context."""
        return True in self.share and in_halves(like)

    def pays(self, indices: Tensor, row_ptr: Tensor, d_sae: int, halves: bool) -> bool:
        """Whether a code of ``d_sae`` latents has enough entries for dense products."""
        size = (row_ptr.numel() - 1) * d_sae
        return size >= LEAST and indices.numel() > self.share[halves] * size

    def decode(self, values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
        """See the reference."""
        halves = self.halves(W_dec)
        if not self.pays(indices, row_ptr, W_dec.shape[0], halves):
            return self.sparse.decode(values, indices, row_ptr, W_dec, b_dec)
        out = torch.empty(row_ptr.numel() - 1, W_dec.shape[1], dtype=torch.float32, device=W_dec.device)
        times = _times(W_dec, halves)
        for rows, acts in self._chunks(values, indices, row_ptr, W_dec.shape[0]):
            out[rows] = times(acts)
        return (out if b_dec is None else out.add_(b_dec)).to(W_dec.dtype)

    def value_grad(self, grad: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor) -> Tensor:
        """See the reference."""
        halves = self.halves(W_dec)
        if not self.pays(indices, row_ptr, W_dec.shape[0], halves):
            return self.sparse.value_grad(grad, indices, row_ptr, W_dec)
        out, times = torch.empty(indices.numel(), dtype=torch.float32, device=grad.device), _times(W_dec.T, halves)
        for rows in _parts(grad.shape[0], W_dec.shape[0], grad.device):
            self.pick(times(grad[rows]), indices, row_ptr[rows.start :], out)
        return out.to(grad.dtype)

    def decode_error(
        self, x: Tensor, values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the reference."""
        if not self.pays(indices, row_ptr, W_dec.shape[0], self.halves(W_dec)):
            return self.sparse.decode_error(x, values, indices, row_ptr, W_dec, b_dec)
        recon = self.decode(values, indices, row_ptr, W_dec, b_dec)
        error = recon.float() - x.float()
        along = self.value_grad(error, indices, row_ptr, W_dec)
        return error.square().sum(1).to(x.dtype), recon, error.to(x.dtype), along.to(x.dtype)

    def by_latent(self, indices: Tensor, row_ptr: Tensor, d_sae: int) -> Sorted | Unsorted:
        """The entries by latent, or a note that no order is needed."""
        halves = self.halves(indices)
        if self.pays(indices, row_ptr, d_sae, halves):
            return Unsorted(indices, row_ptr, d_sae, halves)
        return self.sparse.by_latent(indices, row_ptr, d_sae)

    def latent_grads(
        self,
        by: Sorted | Unsorted,
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
        """See the reference. Dense products leave the part along the rows of ``W_dec`` to the caller."""
        if not isinstance(by, Unsorted):
            return self.sparse.latent_grads(by, values, weight, along, extra, error, x, offset, W_dec, measure)
        dec = enc = bias = None
        if error is not None:
            data = error if weight is None else error * weight[:, None]
            dec = self._sums(values, by, data.float())[0].to(error.dtype)
        if x is not None:
            each = 1.0
            if weight is not None:
                each = weight.repeat_interleave(by.row_ptr.diff(), output_size=values.numel())
            data = x.float() if offset is None else x.float() - offset.float()
            sums = self._sums(entry_grads(values, each, along, extra), by, data)
            enc, bias = (part.to(x.dtype) for part in sums)
        return LatentGrads(dec, enc, bias)

    def _sums(self, weights: Tensor, by: Unsorted, data: Tensor) -> tuple[Tensor, Tensor]:
        """Per latent the sum of weight times row of ``data`` over its entries, and of the weights."""
        total = torch.zeros(by.d_sae, data.shape[1], device=data.device)
        bias = torch.zeros(by.d_sae, device=data.device)
        for rows, acts in self._chunks(weights, by.indices, by.row_ptr, by.d_sae):
            if by.halves:
                total += _times(data[rows], True)(acts.T)
            else:
                total.addmm_(acts.T, data[rows])
            bias += acts.sum(0)
        return total, bias

    def _chunks(self, values: Tensor, indices: Tensor, row_ptr: Tensor, d_sae: int) -> Iterator[tuple[slice, Tensor]]:
        """``(rows, dense code of these rows)``; a chunk is overwritten by the next one."""
        buffer = None
        for rows in _parts(row_ptr.numel() - 1, d_sae, values.device):
            count = rows.stop - rows.start
            if buffer is None:
                buffer = torch.empty(count, d_sae, dtype=torch.float32, device=values.device)
            acts = buffer[:count].zero_()
            self.fill(values, indices, row_ptr[rows.start :], acts)
            yield rows, acts


def _times(W: Tensor, halves: bool) -> Callable[[Tensor], Tensor]:
    """The function ``a -> a @ W`` in float32, or from operands of two bfloat16 numbers each."""
    W = W.float()
    if not halves:
        return lambda a: torch.mm(a.float(), W)
    right = split_right(W)
    return lambda a: wide_product(split_left(a.float()), right)


def _parts(n: int, d_sae: int, device: torch.device) -> Iterator[slice]:
    """Consecutive rows whose dense code fits a chunk."""
    rows = chunk_rows(n, d_sae, 4, CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES)
    for start in range(0, n, max(rows, 1)):
        yield slice(start, min(start + rows, n))


def places(indices: Tensor, row_ptr: Tensor, shape: torch.Size) -> tuple[slice, Tensor]:
    """The entries of the first rows of ``row_ptr``, and their places in a dense ``[rows, d_sae]``; for CPU tensors."""
    count, d_sae = shape
    entries = slice(int(row_ptr[0]), int(row_ptr[count]))
    rows = row_ids(row_ptr[: count + 1], entries.stop - entries.start)
    return entries, rows.mul_(d_sae).add_(indices[entries])


def fill(values: Tensor, indices: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """``out[row, indices[e]] = values[e]`` in plain PyTorch, for CPU tensors."""
    entries, at = places(indices, row_ptr, out.shape)
    out.view(-1)[at] = values[entries]


def pick(dense: Tensor, indices: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """``out[e] = dense[row, indices[e]]`` in plain PyTorch, for CPU tensors."""
    entries, at = places(indices, row_ptr, dense.shape)
    torch.take(dense, at, out=out[entries])

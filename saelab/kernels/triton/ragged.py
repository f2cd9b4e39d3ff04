"""Launching the Triton kernels on ragged codes; popular latents are split into segments without asking the GPU."""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.reference.backend import pointers, row_ids
from saelab.kernels.triton import code
from saelab.kernels.triton.launch import launch
from saelab.kernels.triton.shapes import gather_shape, token_shape

SEGMENT = 512  # entries of one latent that one program sums
WIDEST = 8192  # d_in that one program holds in registers


def decode(values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    n = row_ptr.numel() - 1
    out = torch.empty(n, W_dec.shape[1], dtype=torch.float32, device=W_dec.device)
    rows = torch.arange(n, device=W_dec.device)
    _gather(values, indices, row_ptr[:-1], row_ptr[1:], rows, W_dec.contiguous(), None, out)
    return (out if b_dec is None else out.add_(b_dec)).to(W_dec.dtype)


def value_grad(grad: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor) -> Tensor:
    out, W_dec = torch.empty(indices.numel(), dtype=torch.float32, device=grad.device), W_dec.contiguous()
    if grad.shape[0]:
        strides = grad.shape[1], grad.stride(0), W_dec.stride(0)
        shape = gather_shape(grad.shape[1])
        launch(code.dot_kernel, (grad.shape[0],), grad, indices, row_ptr, W_dec, out, *strides, **shape)
    return out.to(grad.dtype)


def decode_error(
    x: Tensor, values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d_in = x.shape
    if d_in > WIDEST:
        recon = decode(values, indices, row_ptr, W_dec, b_dec)
        error = recon.float() - x.float()
        return error.square().sum(1).to(x.dtype), recon, error, value_grad(error, indices, row_ptr, W_dec).to(x.dtype)
    x, W_dec = x.contiguous(), W_dec.contiguous()
    sse, recon, error = (torch.empty(n, *shape, device=x.device) for shape in ((), (d_in,), (d_in,)))
    along = torch.empty(values.numel(), device=x.device)
    bias = torch.zeros(d_in, device=x.device) if b_dec is None else b_dec.contiguous()
    if n:
        out = sse, recon, error, along
        sizes = d_in, x.stride(0), W_dec.stride(0)
        launch(code.error_kernel, (n,), x, values, indices, row_ptr, W_dec, bias, *out, *sizes, **token_shape(d_in))
    return sse.to(x.dtype), recon.to(x.dtype), error.to(x.dtype), along.to(x.dtype)


def latent_grad(
    weights: Tensor, indices: Tensor, row_ptr: Tensor, data: Tensor, d_sae: int, offset: Tensor | None = None
) -> Tensor:
    order = indices.argsort(stable=True)
    rows, data = row_ids(row_ptr, indices.numel())[order], data.contiguous()
    begin, end, target, pieces = segments(pointers(torch.bincount(indices, minlength=d_sae)), indices.numel())
    out = torch.empty(d_sae + pieces.rows, data.shape[1], dtype=torch.float32, device=data.device)
    _gather(weights[order], rows, begin, end, target, data, offset, out)
    if pieces.rows:
        partial, ones = out[d_sae:], torch.ones(pieces.rows, device=data.device)
        each = torch.arange(pieces.rows, device=data.device)
        _gather(ones, each, pieces.begin, pieces.end, pieces.target, partial, None, out)
    return out[:d_sae].to(data.dtype)


class Pieces:
    """The partial sums of latents with more than one segment: where they lie and which latent they add up to."""

    def __init__(self, split: Tensor, parts: Tensor, rows: int, latents: int) -> None:
        ends = torch.where(split, parts, 0).cumsum(0)
        slots = torch.arange(latents, device=parts.device)
        # The q-th split latent, found without a count that would stall the queue; surplus slots sum nothing.
        self.target = torch.searchsorted(split.cumsum(0), slots, right=True)
        exists = self.target < split.numel()
        latent = self.target.clamp_max(split.numel() - 1)
        self.end = torch.where(exists, ends[latent], 0)
        self.begin = torch.where(exists, ends[latent] - parts[latent], 0)
        self.target = torch.where(exists, latent, -1)
        self.rows = rows


def segments(ptr: Tensor, nnz: int) -> tuple[Tensor, Tensor, Tensor, Pieces]:
    """``begin, end, target`` of at most ``d_sae + nnz // SEGMENT`` segments; split latents go to rows after d_sae."""
    d_sae, split_at_most = ptr.numel() - 1, nnz // SEGMENT
    parts = (ptr.diff() + SEGMENT - 1).div(SEGMENT, rounding_mode="floor").clamp_min(1)
    ends = parts.cumsum(0)
    piece = torch.arange(d_sae + split_at_most, device=ptr.device)
    latent = torch.searchsorted(ends, piece, right=True)
    exists = latent < d_sae
    latent = latent.clamp_max(d_sae - 1)
    part = piece - (ends - parts)[latent]
    begin = torch.where(exists, ptr[latent] + part * SEGMENT, 0)
    end = torch.where(exists, torch.minimum(begin + SEGMENT, ptr[latent + 1]), 0)
    split = parts > 1
    rows = 2 * split_at_most  # a latent with p > 1 segments has more than (p - 1) * SEGMENT entries
    partial = d_sae + (torch.where(split, parts, 0).cumsum(0) - parts)[latent] + part
    target = torch.where(exists, torch.where(split[latent], partial, latent), -1)
    return begin, end, target, Pieces(split, parts, rows, split_at_most)


def _gather(values, indices, begin, end, target, data, offset, out) -> None:
    width = data.shape[1]
    if begin.numel() == 0:
        return
    shape = gather_shape(width)
    centre = data if offset is None else offset.contiguous()
    grid, sizes = (begin.numel(), -(-width // shape["BLOCK"])), (width, data.stride(0), out.stride(0))
    lists = values, indices, begin.contiguous(), end.contiguous(), target
    launch(code.gather_kernel, grid, *lists, data, centre, out, *sizes, CENTRED=offset is not None, **shape)

"""Launching the Triton kernels on ragged codes."""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
from torch import Tensor

from saelab.kernels.reference.backend import LatentGrads, Sorted
from saelab.kernels.triton import code, latents
from saelab.kernels.triton.launch import launch
from saelab.kernels.triton.shapes import entry_shape, gather_shape, power, token_shape

SEGMENT = 512  # entries that one program sums for a latent with more than twice as many, at least
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


def by_latent(indices: Tensor, row_ptr: Tensor, d_sae: int) -> Sorted:
    latents, order = torch.sort(indices.int(), stable=True)
    ptr = torch.searchsorted(latents, torch.arange(d_sae + 1, dtype=torch.int32, device=indices.device))
    rows = torch.searchsorted(row_ptr, order, right=True).sub_(1)
    return Sorted(order, rows, ptr, latents)


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
    """See the reference. What is measured needs rows that fit one program."""
    data = x if error is None else error
    assert data is not None and by.latents is not None
    nnz, d_sae, width, device = values.numel(), by.ptr.numel() - 1, data.shape[1], data.device
    measure = width <= WIDEST and (measure if error is None else W_dec is not None)
    segment = segment_size(nnz, d_sae)
    segments, n_parts = -(-nnz // segment), 2 * -(-nnz // segment)
    # What a flag turns off is never read or written: any tensor stands in for it.
    dec, enc, dec_parts, enc_parts = (
        torch.empty(count if wanted is not None else 0, width, device=device)
        for count in (d_sae, n_parts)
        for wanted in (error, x)
    )
    bias, scale, squares = (torch.empty(d_sae, device=device) for _ in range(3))
    bias_parts = torch.empty(n_parts, device=device)
    matrices = [t if t is None else t.contiguous() for t in (error, x, offset, W_dec)]
    error, x, offset, W_dec = (data if t is None else t for t in matrices)
    flags = {"SEGMENT": segment, "DEC": matrices[0] is not None, "ENC": matrices[1] is not None, "MEASURE": measure}
    options = {"WEIGHTED": weight is not None, "ALONG": along is not None, "EXTRA": extra is not None}
    options["CENTRED"] = matrices[2] is not None
    shape = token_shape(width) if measure else gather_shape(width)
    columns = -(-width // shape["BLOCK"])
    lists = values, *(values if t is None else t.contiguous() for t in (weight, along, extra)), *by
    out = dec, enc, bias, scale, squares
    parts = dec_parts, enc_parts, bias_parts
    sizes = nnz, d_sae, width, error.stride(0), x.stride(0), W_dec.stride(0)
    inputs = error, x, offset, W_dec
    grid, tensors = (d_sae + n_parts, columns), (*lists, *inputs, *out, *parts)
    launch(latents.latents_kernel, grid, *tensors, *sizes, **flags, **options, **shape)
    if segments > 2:  # else no latent can have more than two segments' worth
        rest = {name: size for name, size in shape.items() if name != "ENTRIES"}
        grid, sizes = (d_sae, columns), (width, W_dec.stride(0))
        launch(latents.parts_kernel, grid, by.ptr, *parts, W_dec, *out, *sizes, **flags, **rest)
    found = LatentGrads(*(None if t is None else o.to(data.dtype) for t, o in zip((*matrices[:2], matrices[1]), out)))
    return found._replace(scale=scale if flags["DEC"] else None, squares=squares) if measure else found


def segment_size(nnz: int, d_sae: int) -> int:
    """Entries of one latent that one program sums, at most twice as many: so that the parts need little memory."""
    return max(SEGMENT, power(8 * nnz // max(d_sae, 1)))


def _gather(values, indices, begin, end, target, data, offset, out) -> None:
    width = data.shape[1]
    if begin.numel() == 0:
        return
    shape = gather_shape(width)
    centre = data if offset is None else offset.contiguous()
    grid, sizes = (begin.numel(), -(-width // shape["BLOCK"])), (width, data.stride(0), out.stride(0))
    lists = values, indices, begin.contiguous(), end.contiguous(), target
    launch(code.gather_kernel, grid, *lists, data, centre, out, *sizes, CENTRED=offset is not None, **shape)


def fill(values: Tensor, indices: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """Write the entries of the first rows of ``row_ptr`` into ``out [rows, d_sae]``."""
    launch(code.fill_kernel, (out.shape[0],), values, indices, row_ptr, out, out.shape[1], **entry_shape())


def pick(dense: Tensor, indices: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """Read the entries of the first rows of ``row_ptr`` from ``dense [rows, d_sae]`` into ``out [nnz]``."""
    launch(code.pick_kernel, (dense.shape[0],), dense, indices, row_ptr, out, dense.shape[1], **entry_shape())

"""Matrix products in pieces, so that ``[n, d_sae]`` never has to exist.

A piece goes into a buffer of :mod:`saelab.kernels.memory`, and is valid until the next one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from saelab.kernels.memory import scratch
from saelab.kernels.precision import HALVES, sums_in_float32

CHUNK_BYTES = 1 << 26  # 64 MiB holds 1024 rows at d_sae = 16384; fewer rows slow the library product down
DEVICE_CHUNK_BYTES = 1 << 29  # a GPU needs more rows at a time to be busy
MIN_ROWS = 128
ROWS = 4096  # rows of a block that is split by columns


def products(x: Tensor, W: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first row, x[rows] @ W)`` for consecutive rows; a chunk is valid until the next one.

    An empty batch yields one empty chunk.
    """
    n, width = x.shape[0], W.shape[1]
    rows = chunk_rows(n, width, x.element_size(), CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES)
    with scratch(rows * width, x) as flat:
        for start in range(0, max(n, 1), max(rows, 1)):
            part = x[start : start + rows]
            yield start, torch.mm(part, W, out=flat[: part.shape[0] * width].view(part.shape[0], width))


def wide_products(x: Tensor, W: Tensor) -> Iterator[tuple[int, Tensor]]:
    """:func:`products` whose sums are not rounded to half precision: those of halves are float32."""
    if x.dtype not in HALVES:
        yield from products(x, W)
    elif not sums_in_float32(str(x.device)):
        yield from products(x.float(), W.float())  # products of halves are exact in float32
    else:
        n, width = x.shape[0], W.shape[1]
        rows = chunk_rows(n, width, 4, DEVICE_CHUNK_BYTES)
        out = torch.empty(rows, width, device=x.device)
        for start in range(0, max(n, 1), max(rows, 1)):
            part = x[start : start + rows]
            yield start, torch.mm(part, W, out_dtype=torch.float32, out=out[: part.shape[0]])


def split(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Operands in bfloat16 whose product is ``x @ W`` to within ``2^-16`` of the sum of ``|x| |W|``.

    Each number is the sum of two bfloat16 numbers; the product of the two small parts is left out. One product three
    times as long takes a fraction of the time of a float32 one on hardware made for bfloat16.
    """
    return split_left(x), split_right(W)


def split_left(x: Tensor) -> Tensor:
    high, low = _halves(x)
    return torch.cat([high, low, high], 1)


def split_right(W: Tensor) -> Tensor:
    high, low = _halves(W.T)
    return torch.cat([high, high, low], 1).T


def wide_product(x: Tensor, W: Tensor) -> Tensor:
    """``x @ W`` with float32 sums of operands in half precision."""
    if sums_in_float32(str(x.device)):
        return torch.mm(x, W, out_dtype=torch.float32)
    return torch.mm(x.float(), W.float())


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    return x if b_dec is None else x - b_dec


def pre_act_chunks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """:func:`products` of the centred activations, with the encoder's bias: ``(x - b_dec) @ W_enc + b_enc``."""
    for start, z in wide_products(centred(x, b_dec), W_enc):
        yield start, z if b_enc is None else z.add_(b_enc)


def blocks(x: Tensor, W: Tensor) -> Generator[tuple[int, int, Tensor]]:
    """Yield ``(first row, first column, a block of x @ W)``: all columns of a group of rows, then the next group.

    On the CPU a block of whole columns costs the library less than one of whole rows: the packed ``W`` serves all rows.
    """
    n, width = x.shape[0], W.shape[1]
    rows = _even(n, ROWS, 1)
    columns = _even(width, CHUNK_BYTES // x.element_size() // max(rows, 1), 64)
    with scratch(rows * columns, x) as flat:
        for row in range(0, max(n, 1), max(rows, 1)):
            part = x[row : row + rows]
            for column in range(0, width, columns):
                piece = W[:, column : column + columns]
                out = flat[: part.shape[0] * piece.shape[1]].view(part.shape[0], piece.shape[1])
                yield row, column, torch.mm(part, piece, out=out)


def _even(total: int, most: int, multiple: int) -> int:
    """A piece size near ``most`` that divides ``total`` into pieces of nearly equal size."""
    pieces = max(1, round(total / max(most, multiple)))
    return -(-total // (pieces * multiple)) * multiple


def chunk_rows(n: int, d_sae: int, itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows per chunk, so that a chunk stays near ``chunk_bytes`` and the chunks are of nearly equal size."""
    most = max(MIN_ROWS, chunk_bytes // max(d_sae * itemsize, 1))
    pieces = -(-n // most)
    return -(-n // max(pieces, 1))

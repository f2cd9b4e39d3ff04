"""Compiled reading of stored rows: gathered, widened to float32 and checked in one visit.

PyTorch would gather in 16 bits, widen what it gathered and then look for non-finite numbers: three passes over memory
where one is enough. It runs on the calling thread alone, without the GIL: a reader works beside a trainer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saelab.kernels.numba.launch import compiled

HALF, BRAIN, SINGLE = range(3)
KINDS = {torch.float16: HALF, torch.bfloat16: BRAIN, torch.float32: SINGLE}
AHEAD = 2
REBIAS = np.float32(2.0**112)  # float32's exponent bias less float16's


@compiled()
def widen_rows(source, rows, kind, bits, out):
    """``out[i] = source[rows[i]]``, ``source`` and ``bits`` being the bits of stored rows and ``out``; whether finite.

    float16 keeps its exponent and fraction as they are, in float32's places: too small by a constant power of two,
    also where it is subnormal. Multiplying by that power is exact.
    """
    width, special, touched = source.shape[1], 0, np.uint32(0)
    line = 64 // source.itemsize
    for i in range(rows.size):
        row, to, numbers = source[rows[i]], bits[i], out[i]
        # Rows lie anywhere: ask memory for all of a later one before working on this one.
        coming = source[rows[min(i + AHEAD, rows.size - 1)]]
        for c in range(0, width, line):
            touched |= coming[c]
        if kind == HALF:
            for c in range(width):
                h = np.uint32(row[c])
                to[c] = ((h & np.uint32(0x8000)) << np.uint32(16)) | ((h & np.uint32(0x7FFF)) << np.uint32(13))
                special += 1 if (h & np.uint32(0x7C00)) == np.uint32(0x7C00) else 0
            for c in range(width):
                numbers[c] *= REBIAS
        elif kind == BRAIN:
            for c in range(width):
                h = np.uint32(row[c])
                to[c] = h << np.uint32(16)
                special += 1 if (h & np.uint32(0x7F80)) == np.uint32(0x7F80) else 0
        else:
            for c in range(width):
                h = np.uint32(row[c])
                to[c] = h
                special += 1 if (h & np.uint32(0x7F800000)) == np.uint32(0x7F800000) else 0
    return special == 0 and touched >= 0


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> bool:
    """See :func:`saelab.kernels.reference.backend.gather_rows`."""
    kind = KINDS[source.dtype]
    integers, unsigned = (torch.int32, np.uint32) if kind == SINGLE else (torch.int16, np.uint16)
    numbers = out.numpy()
    stored = source.view(integers).numpy().view(unsigned)
    return bool(widen_rows(stored, rows.numpy(), kind, numbers.view(np.uint32), numbers))

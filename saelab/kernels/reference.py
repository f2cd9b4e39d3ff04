"""What each op computes, in plain PyTorch: the definition, the test oracle and the fallback.

Every other backend is an optimisation of a function in this file. Shapes: ``x [n, d_in]``,
``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``; a ragged code is the triple
``values [nnz]``, ``indices [nnz]``, ``row_ptr [n + 1]`` of :class:`saelab.sparse.SparseCode`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> Tensor:
    """``(x - b_dec) @ W_enc + b_enc``, the one unavoidable matrix product. Returns ``[n, d_sae]``."""
    centred = x if b_dec is None else x - b_dec
    return centred @ W_enc if b_enc is None else torch.addmm(b_enc, centred, W_enc)


def ragged_from_mask(acts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The marked entries of ``acts [n, d_sae]`` as ``(values, indices, row_ptr)``, in latent order."""
    rows, indices = mask.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=acts.shape[0])
    return acts[rows, indices], indices, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def topk(acts: Tensor, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Per row the ``k`` largest entries (magnitudes when ``signed``); ties go to the lowest index.

    Returns values and indices ``[n, k]``. Unsigned values are clipped at zero: a surplus winner is stored as 0.
    """
    key = acts.abs() if signed else acts
    # A stable sort is the definition: torch.topk leaves the order of ties open.
    indices = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
    values = acts.gather(1, indices)
    return (values if signed else values.relu()), indices


def row_ids(row_ptr: Tensor, nnz: int) -> Tensor:
    """The row each entry of a ragged code belongs to, ``[nnz]``."""
    return torch.repeat_interleave(row_ptr.diff(), output_size=nnz)


def decode(values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor) -> Tensor:
    """``dense(code) @ W_dec`` without the dense code. Returns ``[n, d_in]``."""
    return F.embedding_bag(
        indices,
        W_dec,
        row_ptr,
        mode="sum",
        per_sample_weights=values.to(W_dec.dtype),
        include_last_offset=True,
    )

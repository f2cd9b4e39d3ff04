"""Checks of an op's arguments before anything is launched; each message names the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

STORED = (torch.float32, torch.float16, torch.bfloat16)  # what rows of activations are kept in
COMPUTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def matrices(x: Tensor, W: Tensor, d_in: int, name: str, **vectors: tuple[Tensor | None, int]) -> None:
    """``x [n, d_in]`` fits ``W``, whose width on the activations' side is ``d_in``, and so do the named vectors."""
    if x.dim() != 2 or W.dim() != 2:
        raise ValueError(f"x and {name} must be matrices, got shapes {list(x.shape)} and {list(W.shape)}")
    if x.dtype not in COMPUTED:
        raise TypeError(f"x is {x.dtype}; cast it to float32, float64, float16 or bfloat16")
    if x.shape[1] != d_in:
        raise ValueError(f"x has {x.shape[1]} columns but {name} {list(W.shape)} expects d_in={d_in}")
    like(x, **{name: W})
    for vector, (tensor, length) in vectors.items():
        if tensor is not None:
            like(x, **{vector: tensor})
            if list(tensor.shape) != [length]:
                raise ValueError(f"{vector} has shape {list(tensor.shape)}, expected [{length}]")


def like(x: Tensor, **tensors: Tensor) -> None:
    """Every tensor has ``x``'s dtype and device."""
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but x is {x.dtype}; cast one of them")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them")


def encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> None:
    d_in, d_sae = W_enc.shape if W_enc.dim() == 2 else (0, 0)
    matrices(x, W_enc, d_in, "W_enc", b_enc=(b_enc, d_sae), b_dec=(b_dec, d_in))


def budget(k: int, most: int, name: str, limit: str) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name}={k!r} must be an int")
    if not 1 <= k <= most:
        raise ValueError(f"{name}={k} is outside 1..{limit}={most}; choose a budget in that range")


def latent_budgets(budgets: Tensor, n: int, sizes: tuple[int, int] | None) -> None:
    """Numbers of tokens, and what the caller says of them: their sum and a bound."""
    if budgets.device.type != "cpu" or not budgets.numel():  # as below
        return
    if int(budgets.min()) < 0:
        raise ValueError(f"budgets has {int(budgets.min())}; a latent cannot take fewer than 0 tokens")
    found = int(budgets.clamp_max(n).sum()), int(budgets.clamp_max(n).max())
    if sizes is not None and not (found[0] == sizes[0] and found[1] <= sizes[1]):
        raise ValueError(f"sizes={sizes}, but the budgets add up to {found[0]} and the largest is {found[1]}")


def code(values: Tensor, indices: Tensor, row_ptr: Tensor, d_sae: int) -> None:
    """A well-formed ragged code; the indices themselves are checked, since a bad one would read foreign memory."""
    if values.dtype not in COMPUTED:
        raise TypeError(f"values is {values.dtype}; cast it to float32, float64, float16 or bfloat16")
    for name, tensor in (("indices", indices), ("row_ptr", row_ptr)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}, expected torch.int64")
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device} but values is on {values.device}; move one of them")
    if values.dim() != 1 or values.shape != indices.shape or row_ptr.dim() != 1 or row_ptr.numel() == 0:
        raise ValueError(
            f"a code needs values [nnz], indices [nnz] and row_ptr [n + 1], got {list(values.shape)}, "
            f"{list(indices.shape)} and {list(row_ptr.shape)}"
        )
    # On a GPU these reads would stall the queue at every step; there the kernels mask what is out of range.
    if values.device.type != "cpu":
        return
    if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != values.numel() or bool((row_ptr.diff() < 0).any()):
        raise ValueError(f"row_ptr must rise from 0 to nnz={values.numel()}")
    if values.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < d_sae):
        raise ValueError(f"indices span {int(indices.min())}..{int(indices.max())}, outside 0..d_sae-1={d_sae - 1}")

"""Dense float64 versions of every op, written from the definitions and differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> Tensor:
    z = (x if b_dec is None else x - b_dec) @ W_enc
    return z if b_enc is None else z + b_enc


def key(z: Tensor, signed: bool) -> Tensor:
    z = z.abs() if signed else z
    return torch.where(z.isnan(), float("-inf"), z)


def topk_mask(score: Tensor, k: int) -> Tensor:
    """The k largest per row, by counting how many entries beat each one (larger, or equal and further left)."""
    position = torch.arange(score.shape[1], device=score.device)
    a, b = score[:, :, None], score[:, None, :]
    beaten_by = ((b > a) | ((b == a) & (position[None, :] < position[:, None]))).sum(2)
    return beaten_by < k


def dense_code(z: Tensor, mask: Tensor, signed: bool) -> Tensor:
    """Differentiable: what is selected, clipped unless signed, and nothing elsewhere."""
    return torch.where(mask, z if signed else z.relu(), 0.0)


def to_dense(values: Tensor, indices: Tensor, row_ptr: Tensor, d_sae: int) -> Tensor:
    n = row_ptr.numel() - 1
    rows = torch.repeat_interleave(row_ptr.diff(), output_size=indices.numel())
    return values.new_zeros(n, d_sae).index_put((rows, indices), values, accumulate=True)


def to_mask(indices: Tensor, row_ptr: Tensor, d_sae: int) -> Tensor:
    counts = to_dense(torch.ones_like(indices, dtype=torch.int64), indices, row_ptr, d_sae)
    assert counts.numel() == 0 or int(counts.max()) <= 1, "a latent appears twice in a row"
    return counts > 0


def check_selection(found: Tensor, expected: Tensor, score: Tensor, gap: float) -> None:
    """The same set per row, except that entries whose scores differ by less than ``gap`` may stand for each other.

    ``gap`` is the rounding error of a pre-activation; a set that differs by more than that is wrong.
    """
    assert torch.equal(found.sum(1), expected.sum(1)), "a row has the wrong number of entries"
    for row in (found != expected).any(1).nonzero().squeeze(1).tolist():
        extra, lost = score[row][found[row] & ~expected[row]], score[row][expected[row] & ~found[row]]
        assert (lost.max() - extra.min()).abs() <= gap, f"row {row}: {extra} instead of {lost}"


def pursuit(
    x: Tensor, W: Tensor, b: Tensor | None, n_steps: int, residual_stop: float = 0.0, stop_on_repeat: bool = False
) -> Tensor:
    """The naive loop, one token at a time, differentiable. Returns the dense code ``[n, d_sae]``."""
    rows = []
    for r in x if b is None else x - b:
        code, taken = x.new_zeros(W.shape[0]), set()
        for _ in range(n_steps):
            if float(r.detach().norm()) <= residual_stop:
                break
            j = int((W.detach() @ r.detach()).argmax())
            c = W[j] @ r
            if float(c.detach()) <= 0:
                break
            code = code + c * torch.nn.functional.one_hot(torch.tensor(j), W.shape[0]).to(x)
            r = r - c * W[j]
            if stop_on_repeat and j in taken:
                break
            taken.add(j)
        rows.append(code)
    return torch.stack(rows)

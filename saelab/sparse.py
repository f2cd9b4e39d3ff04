"""``SparseCode``: the active latents of a batch of tokens; encoders return it, decoders and metrics take it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.kernels import ByLatent
from saelab.kernels.ragged import pointers


@dataclass(frozen=True)
class SparseCode:
    """Which latents are active on each token, and how strongly.

    Rows are ragged: token ``i`` owns entries ``row_ptr[i] : row_ptr[i + 1]``. Fixed-k variants are the special
    case ``row_ptr = arange(n + 1) * k``. The sign of a value is meaningful, a stored zero means inactive, and
    a latent appears at most once in a row.
    """

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    row_ptr: Int[Tensor, " rows"]  # [n + 1]
    d_sae: int
    by: ByLatent | None = field(default=None, repr=False, compare=False)  # its entries by latent, where gradients ask
    pre_acts: Tensor | None = field(default=None, repr=False, compare=False)  # [nnz], what the values were made of

    @classmethod
    def from_rows(cls, values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], d_sae: int) -> SparseCode:
        """Wrap a rectangular code; no copy."""
        n, k = values.shape
        row_ptr = torch.arange(n + 1, device=values.device) * k
        return cls(values.reshape(-1), indices.reshape(-1), row_ptr, d_sae)

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "n d_sae"]) -> SparseCode:
        """Keep the non-zero entries of a dense code, in latent order."""
        rows, indices = acts.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=acts.shape[0])
        return cls(acts[rows, indices], indices, pointers(counts), acts.shape[1])

    @property
    def n(self) -> int:
        """Tokens in the batch."""
        return self.row_ptr.numel() - 1

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.values.device

    def counts(self) -> Int[Tensor, " n"]:
        """Stored entries per token, stored zeros included."""
        return self.row_ptr.diff()

    def rows(self) -> Int[Tensor, " nnz"]:
        """The token each entry belongs to."""
        return torch.repeat_interleave(self.counts(), output_size=self.values.numel())

    def l0(self) -> Int[Tensor, " n"]:
        """Active latents per token: entries with a non-zero value, either sign."""
        active = torch.zeros(self.n, dtype=torch.int64, device=self.device)
        return active.index_add_(0, self.rows(), (self.values != 0).long())

    def firing_counts(self) -> Int[Tensor, " d_sae"]:
        """On how many tokens of the batch each latent is active."""
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.device)
        # torch.bincount would ask a GPU how long its result is; integers add up to the same in any order.
        return counts.scatter_add_(0, self.indices, (self.values != 0).long())

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents are active anywhere in the batch."""
        flags = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=self.device)
        # Without asking how many are active, which a GPU would have to be waited for; stored zeros go behind the end.
        return flags.index_fill_(0, torch.where(self.values != 0, self.indices, self.d_sae), True)[:-1]

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """The code as a matrix. For tests and small plots only: it has ``n * d_sae`` entries."""
        out = self.values.new_zeros(self.n, self.d_sae)
        return out.index_put((self.rows(), self.indices), self.values, accumulate=True)

    def only(self, keep: Bool[Tensor, " nnz"]) -> SparseCode:
        """The same code with the marked entries alone."""
        counts = torch.bincount(self.rows()[keep], minlength=self.n)
        return SparseCode(self.values[keep], self.indices[keep], pointers(counts), self.d_sae)

    def nonzero(self) -> SparseCode:
        """The same code without stored zeros."""
        return self.only(self.values != 0)

    def first(self, d_sae: int) -> SparseCode:
        """The code in the first ``d_sae`` latents, the others left out."""
        return replace(self.only(self.indices < d_sae), d_sae=d_sae)

    def detach(self) -> SparseCode:
        """The same code, cut from the graph."""
        return replace(self, values=self.values.detach(), pre_acts=None)

    def to(self, device: torch.device | str) -> SparseCode:
        """The same code on another device."""
        return SparseCode(self.values.to(device), self.indices.to(device), self.row_ptr.to(device), self.d_sae)

    def __getitem__(self, rows: slice) -> SparseCode:
        """A contiguous run of tokens."""
        start, stop, step = rows.indices(self.n)
        if step != 1:
            raise ValueError(f"a SparseCode is sliced in steps of 1, not {step}; index its dense() form instead")
        ptr = self.row_ptr[start : max(start, stop) + 1]
        entries = slice(int(ptr[0]), int(ptr[-1]))
        return SparseCode(self.values[entries], self.indices[entries], ptr - ptr[0], self.d_sae)

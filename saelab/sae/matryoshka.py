"""Matryoshka BatchTopK: nested dictionaries, each of which must reconstruct on its own (Bussmann et al., 2025,
arXiv 2503.17547).

Latents are selected once, over the whole dictionary, as in BatchTopK. The loss adds up the squared errors of the
prefixes of the dictionary, so that general features stay in the first group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from saelab import kernels
from saelab.errors import UserError
from saelab.sae.threshold import BatchBudgetSAE
from saelab.sparse import SparseCode


class Matryoshka(BatchBudgetSAE, variant="matryoshka"):
    """BatchTopK whose loss is the squared error of every prefix ``recon_m = b_dec + sum_(j < m) z_j d_j``."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int | float = 32,
        groups: Sequence[float] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
        prefix_loss: Literal["mean", "sum"] = "mean",
        signed: bool = False,
    ) -> None:
        """
        Args:
            k: Latents per token, on average over the batch.
            groups: Shares of the dictionary; each prefix ends with one of them. They add up to 1.
            prefix_loss: Mean over the prefixes and b_dec alone (the authors' code), or sum over the prefixes (paper).
            signed: Keep the largest magnitudes with their sign.
        """
        super().__init__(d_in, d_sae, k, signed, groups=[float(share) for share in groups], prefix_loss=prefix_loss)
        self.config["signed"] = signed
        if not groups or min(groups) <= 0 or abs(sum(groups) - 1) > 1e-6:
            raise UserError(f"groups={list(groups)} must be positive shares that add up to 1")
        ends = [round(share * d_sae) for share in accumulate(groups)]
        self.prefixes = [*ends[:-1], d_sae]
        self.prefix_loss = prefix_loss
        if min(b - a for a, b in zip([0, *self.prefixes], self.prefixes)) < 1:
            raise UserError(f"groups={list(groups)} leave a group of d_sae={d_sae} without a latent; use fewer groups")

    def reconstruction_loss(self, x: Tensor, code: SparseCode) -> tuple[Tensor, Tensor]:
        recon, start, losses = self.b_dec.expand_as(x), 0, []
        if self.prefix_loss == "mean":
            losses.append((x - recon).square().sum())
        for end in self.prefixes:
            recon = recon + self._decode_group(code, start, end)
            losses.append((x - recon).square().sum())
            start = end
        total = torch.stack(losses).sum()
        return (total / len(losses) if self.prefix_loss == "mean" else total), recon.detach()

    def _decode_group(self, code: SparseCode, start: int, end: int) -> Tensor:
        keep = (code.indices >= start) & (code.indices < end)
        counts = torch.bincount(code.rows()[keep], minlength=code.n)
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return kernels.decode(code.values[keep], code.indices[keep], row_ptr, self.W_dec, None)

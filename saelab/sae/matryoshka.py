"""Matryoshka BatchTopK: nested dictionaries, each of which must reconstruct on its own (Bussmann et al., 2025,
arXiv 2503.17547).

Latents are selected once, over the whole dictionary, as in BatchTopK. The loss is the sum of the squared errors of the
dictionary's prefixes, which keeps general features in the first group.

With ``random_prefixes`` the prefixes are drawn anew in each step, and latents are ordered by how much they contribute
(a running mean of their squared activations, as their directions have unit norm). This is how Nabeshima's variant
works, which Costa et al. (2025) compare with; their code draws P(length) ~ sqrt(length) - sqrt(length - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from saelab import kernels
from saelab.errors import UserError
from saelab.sae.threshold import BatchBudgetSAE
from saelab.sparse import SparseCode

MEMORY = 0.95  # per step, of the running mean of contributions


class Matryoshka(BatchBudgetSAE, variant="matryoshka"):
    """BatchTopK whose loss is the squared error of every prefix ``recon_m = b_dec + sum_(j < m) z_j d_j``."""

    tunable = (*BatchBudgetSAE.tunable, "groups", "prefix_loss")
    only_if_set = (*BatchBudgetSAE.only_if_set, "random_prefixes")
    contribution: Tensor
    ends: Tensor  # of the prefixes, on the device

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        groups: Sequence[float] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
        prefix_loss: Literal["mean", "sum"] = "mean",
        random_prefixes: int = 0,
        **options: Any,
    ) -> None:
        """
        Args:
            groups: Shares of the dictionary; each prefix ends with one of them. They add up to 1.
            prefix_loss: Mean over the prefixes and b_dec alone (the authors' code), or sum over the prefixes (paper).
            random_prefixes: Number of prefixes drawn anew in each step, beside the whole dictionary, instead of
                ``groups``; 0 keeps the groups.
        """
        super().__init__(d_in, d_sae, **options)
        self.config["groups"] = [float(share) for share in groups]
        if not groups or min(groups) <= 0 or abs(sum(groups) - 1) > 1e-6:
            raise UserError(f"groups={list(groups)} must be positive shares that add up to 1")
        ends = [round(share * d_sae) for share in accumulate(groups)]
        self.prefixes = [*ends[:-1], d_sae]
        self.register_buffer("ends", torch.tensor(self.prefixes), persistent=False)
        self.prefix_loss = prefix_loss
        if min(b - a for a, b in zip([0, *self.prefixes], self.prefixes)) < 1:
            raise UserError(f"groups={list(groups)} leave a group of d_sae={d_sae} without a latent; use fewer groups")
        if not 0 <= random_prefixes < d_sae:
            raise UserError(f"random_prefixes={random_prefixes} is outside 0..d_sae-1={d_sae - 1}")
        self.random_prefixes = random_prefixes
        if random_prefixes:
            self.register_buffer("contribution", torch.zeros(d_sae, dtype=torch.float64))

    @property
    def budget_over(self) -> None:
        return None  # its loss needs every prefix of the dictionary

    def reconstruction_loss(self, x: Tensor, code: SparseCode) -> tuple[Tensor, Tensor]:
        recon, losses = self.b_dec.expand_as(x), []
        ends, places = self._draw(code) if self.random_prefixes else (self.ends, code.indices)
        if self.prefix_loss == "mean":
            losses.append((x - recon).square().sum())
        for group in self._decode_groups(code, torch.searchsorted(ends, places, right=True), ends.numel()):
            recon = recon + group
            losses.append((x - recon).square().sum())
        total = torch.stack(losses).sum()
        return (total / len(losses) if self.prefix_loss == "mean" else total), recon.detach()

    @torch.no_grad()
    def _draw(self, code: SparseCode) -> tuple[Tensor, Tensor]:
        """Ends of this step's prefixes, and the place of each entry's latent in the order of contributions."""
        power = torch.zeros_like(self.contribution).index_add_(
            0, code.indices, code.values.to(self.contribution).square()
        )
        self.contribution.lerp_(self.share.sum(power) / (code.n * self.share.parts), 1 - MEMORY)
        lengths = torch.arange(1, self.d_sae, dtype=power.dtype, device=power.device)
        share = lengths.sqrt() - (lengths - 1).sqrt()
        # torch.multinomial does the same, and makes a GPU wait to see that all shares are numbers.
        drawn = (share / torch.empty_like(share).exponential_()).topk(self.random_prefixes).indices.sort().values + 1
        order = self.contribution.argsort(descending=True, stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(self.d_sae, device=order.device))
        return torch.cat([drawn, self.ends[-1:]]), places[code.indices]

    def _decode_groups(self, code: SparseCode, group: Tensor, count: int) -> Sequence[Tensor]:
        """What each of ``count`` groups writes, ``[n, d_in]``; ``group [nnz]`` says which one an entry belongs to.

        One code with a row for each token and group, so that nothing has to be known of how many entries a group has,
        for which a GPU would have to be waited for.
        """
        rows, order = (code.rows() * count + group).sort(stable=True)
        row_ptr = torch.searchsorted(rows, torch.arange(code.n * count + 1, device=rows.device))
        values, indices = code.values.gather(0, order), code.indices[order]
        by = kernels.ByLatent(indices, row_ptr, self.d_sae)
        by.sums = None if code.by is None else code.by.sums
        return kernels.decode(values, indices, row_ptr, self.W_dec, None, by).view(code.n, count, -1).unbind(1)

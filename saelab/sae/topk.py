"""TopK: the k largest pre-activations of each token (Gao et al., 2024, arXiv 2406.04093).

Selection happens on the raw pre-activations, then ReLU: when fewer than ``k`` are positive the surplus is stored as
zero and counts as inactive, so L0 <= k.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from saelab import kernels
from saelab.errors import UserError
from saelab.kernels import SelectedPreActs
from saelab.sae.budget import BudgetSAE

PROBES, PROBE_SEED = 256, 7_046_029  # random unit vectors that measure the length of reconstructions


class TopK(BudgetSAE, variant="topk"):
    """``z = ReLU(TopK_k(W_enc^T (x - b_dec) + b_enc))``."""

    saelens = "topk"
    only_if_set = (*BudgetSAE.only_if_set, "match_norm")

    def __init__(self, d_in: int, d_sae: int, k: int = 32, match_norm: bool = False, **options: Any) -> None:
        """
        Args:
            k: Latents per token.
            match_norm: At the start, divide W_enc by the norm that reconstructions of random unit vectors have about
                b_dec: what comes out is then as long as what goes in (OpenAI's code, which sees no clear gain in it).
        """
        super().__init__(d_in, d_sae, k, **options)
        if match_norm and self.transcodes:
            raise UserError("match_norm compares a reconstruction with its input; leave it out with a target")
        self.match_norm = match_norm

    @torch.no_grad()
    def initialise(self, x: Tensor, b_dec: Tensor) -> None:
        super().initialise(x, b_dec)
        if self.match_norm:
            # A separate seed: with the run's seed the probes would be the numbers that the dictionary was drawn from.
            probes = torch.randn(PROBES, self.d_in, generator=torch.Generator().manual_seed(PROBE_SEED)).to(x)
            probes /= probes.norm(dim=1, keepdim=True)
            reached = (self.decode(self.encode(probes + self.b_dec)) - self.b_dec).norm(dim=1).mean()
            self.W_enc.div_(reached.clamp_min(torch.finfo(x.dtype).tiny))

    @property
    def budget_over(self) -> Literal["token"] | None:
        return None if self.match_norm else "token"  # matching looks at reconstructions by the whole dictionary

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return kernels.select_topk(x, self.W_enc, self.b_enc, self.b_in, round(self.budget))

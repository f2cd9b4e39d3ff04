"""An SAE whose codes are given: the first number of an activation says which."""

from __future__ import annotations

import torch

from saelab.sae import SAE
from saelab.sparse import SparseCode


class Lookup(SAE):
    """The code of an activation is the row of ``code [n, d_sae]`` that its first number names."""

    variant = "lookup"

    def __init__(self, code: torch.Tensor, d_in: int = 4) -> None:
        super().__init__(d_in, code.shape[1])
        self.code = code
        self.signed = bool((code < 0).any())

    def encode(self, x: torch.Tensor, grads: torch.Tensor | None = None) -> SparseCode:
        return SparseCode.from_dense(self.code[x[:, 0].long()])

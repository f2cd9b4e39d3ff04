"""Comparisons on planted dictionaries: caches with known latents, and a readout in place of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.data.synthetic import Planted
from saelab.metrics import feature_detection, match_dictionary, matched_correlation
from saelab.sae import SAE
from saelab.sparse import SparseCode


@dataclass
class World:
    """A planted dictionary, a cache of samples from it, and fresh samples with their true code."""

    planted: Planted
    cache: ActivationCache
    x: Tensor
    truth: SparseCode

    @classmethod
    def make(cls, folder: Path, planted: Planted, n: int, seed: int, n_test: int = 4000) -> World:
        x, _ = planted.sample(n, seed=seed)
        cache = ActivationCache.from_tensors(folder, x, held_out=0.1, overwrite=True)
        return cls(planted, cache, *planted.sample(n_test, seed=seed + 10_000))

    @torch.no_grad()
    def recovery(self, sae: SAE) -> dict[str, float]:
        """How much of the planted dictionary the SAE holds; signs are free for a signed SAE."""
        code = sae.encode(self.x)
        matching = match_dictionary(sae.W_dec, self.planted.directions, sae.signed)
        return {
            "mean_cosine": matching.mean_cosine,
            "mcc": matched_correlation(code, self.truth, sae.signed),
            "f1": float(feature_detection(code, self.truth, matching).f1.mean()),
        }


class Readout:
    """A loss that sees some planted features only: next "tokens" drawn from ``softmax(x @ W_U)``.

    ``W_U [d_in, vocab]`` reads the directions listed in ``relevant`` and is blind to the rest as far as they are
    orthogonal. Gradients of the loss at ``x`` are exact, and contain the label.
    """

    def __init__(
        self, planted: Planted, relevant: Tensor, vocab: int = 32, strength: float = 6.0, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        effects = strength * torch.randn(relevant.numel(), vocab, generator=generator) / relevant.numel() ** 0.5
        self.W_U = torch.linalg.pinv(planted.directions)[:, relevant] @ effects

    def labels(self, x: Tensor, seed: int) -> Tensor:
        """Tokens drawn from the readout of the clean activations."""
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial((x @ self.W_U).softmax(1), 1, generator=generator)[:, 0]

    def grads(self, x: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each token's cross-entropy at ``x``, ``[n, d_in]``."""
        p = (x @ self.W_U).softmax(1)
        p[torch.arange(len(labels)), labels] -= 1
        return p @ self.W_U.T

    def cross_entropy(self, x: Tensor, labels: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy((x @ self.W_U).double(), labels))

    def recovered(self, x: Tensor, recon: Tensor, labels: Tensor) -> float:
        """Share of the cross-entropy recovered, against ablation to zero."""
        zero, clean = self.cross_entropy(torch.zeros_like(x), labels), self.cross_entropy(x, labels)
        return (zero - self.cross_entropy(recon, labels)) / (zero - clean)

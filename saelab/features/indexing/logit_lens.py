"""The tokens of the vocabulary and the other latents that a latent's decoder row is close to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import damaged
from saelab.files import write_tensors

ROWS = 64, 512  # directions whose products are held at once on a CPU: at least, at most; fewer multiply more slowly
HELD = 1 << 24  # products between those: 64 MiB of them
DEVICE_ROWS = 2048  # elsewhere


@dataclass(frozen=True)
class LogitLens:
    """Direct effect of a direction in the residual stream on the logits (nostalgebraist, 2020).

    The effect of ``direction`` is ``(direction * norm_weight) @ unembed``, minus its mean over the vocabulary (which
    no softmax sees). The final norm's weight is folded in; its division by the token's own norm is left out, because
    it scales all logits of a token alike and depends on the token. ``centred`` norms (LayerNorm) also subtract the
    direction's mean first. For a hook before the last layer this ignores everything the later layers would do.
    """

    unembed: Float[Tensor, "d_in vocab"]
    norm_weight: Float[Tensor, " d_in"] | None = None
    centred: bool = False

    def save(self, path: Path, model: str, weights: str = "") -> None:
        """Keep it in a file (half precision), so that later indexes need no model. ``model`` is its name, ``weights``
        their fingerprint."""
        tensors = {
            "unembed": self.unembed.half(),
            "centred": torch.tensor([self.centred]),
            "model": torch.tensor(list(model.encode()), dtype=torch.uint8),
            "weights": torch.tensor(list(weights.encode()), dtype=torch.uint8),
        }
        if self.norm_weight is not None:
            tensors["norm_weight"] = self.norm_weight
        write_tensors(path, tensors)

    @classmethod
    def open(cls, path: Path, model: str, weights: str = "") -> LogitLens | None:
        """The lens of ``model`` kept in a file; None where there is none, or that of another model or other weights.

        A file of 0.1.0 does not say of which weights it is, and does not count where ``weights`` are known.
        """
        if not path.is_file():
            return None
        with damaged(path, "remove it", SafetensorError, RuntimeError):
            kept = load_file(path)
            of = [bytes(kept[name].tolist()).decode() if name in kept else "" for name in ("model", "weights")]
            same = of == [model, weights]
            return cls(kept["unembed"].float(), kept.get("norm_weight"), bool(kept["centred"])) if same else None

    def to(self, device: torch.device | str) -> LogitLens:
        """The same lens on a device."""
        norm = None if self.norm_weight is None else self.norm_weight.to(device)
        return LogitLens(self.unembed.to(device), norm, self.centred)

    def effects(self, directions: Float[Tensor, "m d_in"]) -> Float[Tensor, "m vocab"]:
        """Logit change per unit of each direction."""
        directions = self._normalised(directions)
        return directions @ self.unembed - (directions @ self._mean_token)[:, None]

    def _normalised(self, directions: Float[Tensor, "m d_in"]) -> Float[Tensor, "m d_in"]:
        """What the final norm makes of directions, up to its division."""
        directions = directions.to(self.unembed)
        if self.centred:
            directions = directions - directions.mean(1, keepdim=True)
        return directions if self.norm_weight is None else directions * self.norm_weight.to(directions)

    @cached_property
    def _mean_token(self) -> Float[Tensor, " d_in"]:
        return self.unembed.mean(1)

    def extremes(
        self, directions: Float[Tensor, "m d_in"], n: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(values, token ids) of the ``n`` most promoted tokens, then of the most suppressed; each ``[m, n]``."""
        n, directions = min(n, self.unembed.shape[1]), self._normalised(directions)
        parts = []
        for rows in directions.split(_rows(directions, self.unembed.shape[1])):
            logits, mean = rows @ self.unembed, (rows @ self._mean_token)[:, None]
            up, down = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
            parts.append((up.values - mean, up.indices, down.values - mean, down.indices))
        high, high_ids, low, low_ids = (torch.cat(column) for column in zip(*parts))
        return (high, high_ids), (low, low_ids)


def neighbours(
    unit: Float[Tensor, "d_sae d_in"], start: int, stop: int, n: int, signed: bool
) -> tuple[Float[Tensor, "m n"], Int[Tensor, "m n"]]:
    """Cosines and numbers of the ``n`` closest other rows for rows ``start .. stop`` of a unit-row matrix.

    Closest is the largest cosine, or the largest absolute cosine where ``signed`` (the cosine keeps its sign).
    """
    found = []
    for rows in torch.arange(start, stop, device=unit.device).split(_rows(unit, len(unit))):
        cosines = unit[rows] @ unit.T
        key = cosines.abs() if signed else cosines
        key[torch.arange(len(rows), device=unit.device), rows] = -torch.inf  # no row is its own neighbour
        best = key.topk(min(n, unit.shape[0] - 1), dim=1).indices
        found.append((cosines.gather(1, best), best))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def _rows(like: Tensor, columns: int) -> int:
    return min(max(HELD // columns, ROWS[0]), ROWS[1]) if like.device.type == "cpu" else DEVICE_ROWS

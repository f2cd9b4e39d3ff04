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

from saelab import kernels
from saelab.errors import damaged
from saelab.files import write_tensors


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

    def __post_init__(self) -> None:
        # Column by column, as selection reads it.
        object.__setattr__(self, "unembed", self.unembed.T.contiguous().T)

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
        mean = (directions @ self._mean_token)[:, None]
        (high, high_ids), (low, low_ids) = (_largest(rows, self.unembed, n) for rows in (directions, -directions))
        return (high - mean, high_ids), (-low - mean, low_ids)


def neighbours(
    unit: Float[Tensor, "d_sae d_in"], start: int, stop: int, n: int, signed: bool
) -> tuple[Float[Tensor, "m n"], Int[Tensor, "m n"]]:
    """Cosines and numbers of the ``n`` closest other rows for rows ``start .. stop`` of a unit-row matrix.

    Closest is the largest cosine, or the largest absolute cosine where ``signed`` (the cosine keeps its sign).
    """
    cosines, numbers = _largest(unit[start:stop], unit.T, min(n + 1, len(unit)), signed)
    key = cosines.abs() if signed else cosines
    own = torch.arange(start, stop, device=unit.device)[:, None]
    # No row is its own neighbour.
    key = torch.where(numbers == own, -torch.inf, key)
    order = key.argsort(dim=1, descending=True, stable=True)[:, : min(n, len(unit) - 1)]
    return cosines.gather(1, order), numbers.gather(1, order)


def _largest(
    rows: Float[Tensor, "m d_in"], columns: Float[Tensor, "d_in n"], k: int, signed: bool = False
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The ``k`` largest products of each row with the columns (largest in magnitude, where ``signed``), and which."""
    found = kernels.select_topk(rows, columns, None, None, k, signed, clip=False)
    values, numbers = found.values.view(-1, k), found.indices.view(-1, k)
    order = (values.abs() if signed else values).argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), numbers.gather(1, order).long()

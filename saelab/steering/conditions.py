"""Conditions: act only on tokens where a latent or a probe fires above a threshold.

A condition is read at its own hook point, which may lie before that of the intervention that it belongs to. It sees
the activations as they arrive there, after all steering at earlier layers and before any at its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import UserError
from saelab.lm.hook_names import layer_of
from saelab.runs import Run
from saelab.steering.positions import TokenContext
from saelab.steering.vectors import SteeringVector, Strength, parse_strength


class Condition(ABC):
    """Tells on which tokens an intervention acts, from the activations at ``hook_name``."""

    @property
    @abstractmethod
    def hook_name(self) -> str:
        """Where it is read."""

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Width of the activations it reads."""

    @abstractmethod
    def holds(self, x: Float[Tensor, "batch length d_in"], context: TokenContext) -> Bool[Tensor, "batch length"]:
        """The tokens on which it holds."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it says, without tensors, as JSON."""


@dataclass(frozen=True, eq=False)
class LatentFires(Condition):
    """A latent's activation on one pole lies above a threshold: an activation, or ``"0.5max"`` of its maximum.

    It never holds on a text's first token, where the code of an SAE means nothing.
    """

    run: Run
    latent: int
    above: Strength = 0.0
    pole: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.run, Run):
            raise UserError(
                f"LatentFires takes a Run, not a {type(self.run).__name__}; open a folder with Run.open(path)"
            )
        if self.pole not in (-1, 1):
            raise UserError(f"pole {self.pole!r} is neither 1 nor -1")
        self.run.check_latent(self.latent)
        _ = self.threshold

    @cached_property
    def threshold(self) -> float:
        """The activation above which it holds, positive on either pole."""
        number, unit = parse_strength(self.above)
        if unit:
            vector = SteeringVector.from_latent(self.run, self.latent, self.pole)
            number = vector.length(self.above) / vector.norm
        if number < 0:
            raise UserError(f"the threshold {self.above!r} is negative, but a silent latent has 0; give 0 or more")
        return number

    @property
    def hook_name(self) -> str:
        return self.run.hook_name

    @property
    def d_in(self) -> int:
        return self.run.sae.d_in

    @torch.no_grad()
    def holds(self, x: Float[Tensor, "batch length d_in"], context: TokenContext) -> Bool[Tensor, "batch length"]:
        chosen = context.select("all", skip_first=True)
        mask = torch.full(x.shape[:2], chosen, device=x.device) if isinstance(chosen, bool) else chosen.to(x.device)
        found = torch.zeros_like(mask)
        rows = x[mask].to(self.run.sae.W_dec)
        if len(rows):
            code = self.run.sae.encode(rows)
            fires = (code.indices == self.latent) & (code.values * self.pole > self.threshold)
            active = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            active[code.rows()[fires]] = True
            found[mask] = active.to(x.device)
        return found

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "latent",
            "latent": self.latent,
            "pole": self.pole,
            "above": self.threshold,
            "hook_name": self.hook_name,
        }


@dataclass(frozen=True, eq=False)
class ProbeFires(Condition):
    """The component along a direction, such as that of a probe, lies above a threshold; units as for a strength."""

    vector: SteeringVector
    above: Strength = 0.0

    def __post_init__(self) -> None:
        _ = self.threshold

    @property
    def threshold(self) -> float:
        """The threshold in units of the activations."""
        return self.vector.length(self.above)

    @property
    def hook_name(self) -> str:
        return self.vector.hook_name

    @property
    def d_in(self) -> int:
        return self.vector.d_in

    @torch.no_grad()
    def holds(self, x: Float[Tensor, "batch length d_in"], context: TokenContext) -> Bool[Tensor, "batch length"]:
        return x.float() @ self.vector.direction.to(x.device) > self.threshold

    def settings(self) -> dict[str, Any]:
        return {"kind": "probe", "above": self.threshold, "hook_name": self.hook_name}


class Gate:
    """A condition while a model is steered: its answer in the present forward pass."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self._answer: tuple[TokenContext, Tensor] | None = None

    def read(self, x: Tensor, context: TokenContext) -> None:
        """Take in the activations at the condition's hook point."""
        self._answer = (context, self.condition.holds(x, context))

    def mask(self, context: TokenContext, hook_name: str) -> Bool[Tensor, "batch length"]:
        """The tokens on which the condition holds; UserError where it was not read yet in this pass."""
        if self._answer is None or self._answer[0] is not context:
            raise late(self.condition, hook_name)
        return self._answer[1]


def late(condition: Condition, hook_name: str) -> UserError:
    """The error for a condition that is known only after the intervention had to act."""
    return UserError(
        f"the condition is read at {condition.hook_name}, after the model passed {hook_name}, where the intervention "
        "acts; read it at the same hook point or an earlier one"
    )


def check_order(condition: Condition, hook_name: str) -> None:
    """Refuse a condition of a later layer than the intervention's."""
    read, act = layer_of(condition.hook_name), layer_of(hook_name)
    if read is not None and act is not None and read > act:
        raise late(condition, hook_name)

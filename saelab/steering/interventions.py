"""What steering can do to the activations at a hook point.

Two families. *Vector* interventions (:class:`Add`, :class:`ProjectOut`) act on the activations directly. *Latent*
interventions (:class:`Scale`, :class:`Clamp`, :class:`MinClamp`, :class:`Ablate`) encode the activations, change the
code of one latent and write back only the difference, ``x + decode(code') - decode(code)``: what the SAE does not
explain stays in place unless ``keep_error=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.runs import Run, as_run
from saelab.sae import SAE
from saelab.steering.positions import Where, check_where
from saelab.steering.vectors import SteeringVector, Strength, parse_strength, pole_sign


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """One change at one hook point.

    ``where`` says on which tokens: "all", "prompt", "generated", a list of positions in the text (negative ones count
    back from the prompt's end), or a predicate on a :class:`~saelab.steering.positions.TokenContext`. Padding is never
    touched. ``skip_first`` leaves out each text's first token, whose activations are an attention sink of huge norm.
    """

    where: Where = "all"
    skip_first: bool = False
    hook_name: str = ""

    def __post_init__(self) -> None:
        check_where(self.where)

    @property
    def idle(self) -> bool:
        """Whether it changes nothing; then the model runs without a hook for it."""
        return False

    @property
    def d_in(self) -> int:
        """Width of the activations it acts on."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """``x + strength * direction``; see :class:`SteeringVector` for the units a strength may have."""

    vector: SteeringVector
    strength: Strength = "1raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hook_name", self.hook_name or self.vector.hook_name)
        self.vector.length(self.strength)  # a unit that is not known is refused here, not in the middle of a generation

    @property
    def length(self) -> float:
        """The strength in units of the activations."""
        return self.vector.length(self.strength)

    @property
    def idle(self) -> bool:
        return self.length == 0

    @property
    def d_in(self) -> int:
        return self.vector.d_in

    def prepare(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The edit of selected activations ``[..., d_in]``, for tensors like ``like``."""
        shift = (self.vector.direction * self.length).to(like)
        return lambda x: x + shift


@dataclass(frozen=True, eq=False)
class ProjectOut(Intervention):
    """Remove from ``x`` its component in the span of one or more directions (directional ablation)."""

    vectors: SteeringVector | Sequence[SteeringVector]
    strength: float = 1.0  # fraction removed

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({(v.hook_name, v.d_in) for v in self.directions}) != 1:
            raise UserError("ProjectOut takes one or more vectors of the same hook point and width")
        object.__setattr__(self, "hook_name", self.hook_name or self.directions[0].hook_name)

    @property
    def directions(self) -> tuple[SteeringVector, ...]:
        """The vectors as a tuple, also when there is one."""
        return (self.vectors,) if isinstance(self.vectors, SteeringVector) else tuple(self.vectors)

    @property
    def idle(self) -> bool:
        return self.strength == 0

    @property
    def d_in(self) -> int:
        return self.directions[0].d_in

    def prepare(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The edit of selected activations ``[..., d_in]``, for tensors like ``like``."""
        directions = torch.stack([vector.direction for vector in self.directions]).double()
        # Vectors that nearly repeat each other span one axis, not two.
        _, sizes, axes = torch.linalg.svd(directions, full_matrices=False)
        basis = axes[sizes > 1e-6 * sizes[0]].to(like)
        return lambda x: x - self.strength * ((x @ basis.T) @ basis)


@dataclass(frozen=True, eq=False)
class LatentIntervention(Intervention):
    """A change to the code of one latent.

    ``pole`` limits it to activations of one sign (``1`` or ``-1``); 0 means both.
    """

    run: Run | SAE | Path | str  # becomes a Run
    latent: int
    pole: int = field(default=0, kw_only=True)
    keep_error: bool = field(default=True, kw_only=True)
    # Codes of the first token mean nothing: SAEs are trained without it.
    skip_first: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        run = as_run(self.run, self.hook_name)
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "hook_name", self.hook_name or run.hook_name)
        object.__setattr__(self, "pole", pole_sign(self.pole) if self.pole else 0)
        run.check_latent(self.latent)

    @property
    def source(self) -> Run:
        """The SAE with what is known of it."""
        return as_run(self.run, self.hook_name)

    @property
    def sae(self) -> SAE:
        return self.source.sae

    @property
    def d_in(self) -> int:
        return self.sae.d_in

    def edit(self, values: Tensor) -> Tensor:
        """The latent's new activations from its present ones ``[n]``, zeros where it does not fire."""
        new = self.change(values)
        return new if self.pole == 0 else torch.where(values * self.pole > 0, new, values)

    def change(self, values: Tensor) -> Tensor:
        """The new activations where the intervention applies."""
        raise NotImplementedError

    def activation(self, strength: Strength, pole: int) -> float:
        """A strength as an activation of the latent; "1max" is its largest activation on ``pole``."""
        number, unit = parse_strength(strength)
        if unit == "":
            return number
        if unit != "max":
            raise UserError(f"an activation is a number or a multiple of max, not {strength!r}")
        vector = SteeringVector.from_latent(self.source, self.latent, pole)
        return pole * vector.length(strength) / vector.norm


@dataclass(frozen=True, eq=False)
class Scale(LatentIntervention):
    """Multiply the latent's own activation where it fires."""

    factor: float = 2.0

    @property
    def idle(self) -> bool:
        return self.factor == 1 and self.keep_error

    def change(self, values: Tensor) -> Tensor:
        return values * self.factor


@dataclass(frozen=True, eq=False)
class Ablate(LatentIntervention):
    """Set the latent's activation to zero."""

    def change(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)


@dataclass(frozen=True, eq=False)
class Clamp(LatentIntervention):
    """Set the latent's activation to ``value`` on every token, whether it fires there or not.

    ``value`` is an activation or a multiple of the latent's maximum, ``"0.8max"``; with ``pole=-1`` that is the largest
    magnitude on the negative pole, and the value is negative.
    """

    value: Strength = "1max"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_target", self.activation(self.value, self.pole or 1))

    @property
    def target(self) -> float:
        """The activation aimed at."""
        return self.__dict__["_target"]

    def edit(self, values: Tensor) -> Tensor:
        return torch.full_like(values, self.target)


@dataclass(frozen=True, eq=False)
class MinClamp(Clamp):
    """Raise the latent's activation to ``value`` where it lies below (on the negative pole: above)."""

    def edit(self, values: Tensor) -> Tensor:
        return values.clamp(max=self.target) if self.target < 0 else values.clamp(min=self.target)


def describe(intervention: Intervention) -> dict[str, Any]:
    """The settings of an intervention as JSON, its tensors left out."""
    where = intervention.where
    if callable(where):
        where = "predicate"
    settings: dict[str, Any] = {
        "op": type(intervention).__name__,
        "hook_name": intervention.hook_name,
        "where": where if isinstance(where, str) else [int(p) for p in where],
        "skip_first": intervention.skip_first,
    }
    for name in ("strength", "latent", "pole", "keep_error", "factor", "value"):
        if hasattr(intervention, name):
            settings[name] = getattr(intervention, name)
    if isinstance(intervention, Add):
        settings["length"] = intervention.length
    return settings

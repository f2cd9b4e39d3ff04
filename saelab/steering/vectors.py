"""``SteeringVector``: a unit direction at one hook point, with its length, its units and its origin."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import layout
from saelab.errors import UserError
from saelab.runs import Run, as_run
from saelab.sae import SAE

# A strength is a length along the unit direction in units of the activations, or a number with a unit.
Strength = float | str
_UNITS = {"max": "max", "x": "max", "norm": "norm", "raw": "raw"}
_STRENGTH = re.compile(r"([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+)\s*([a-z]*)")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the activations at one hook point; that of a latent lies where its SAE writes.

    Strengths may be given as multiples of three lengths: ``"0.8max"`` (or ``"0.8x"``) of the largest activation of
    the latent it came from, ``"0.5norm"`` of the root-mean-square norm of the activations, ``"1raw"`` of the vector's
    own length before it was made a unit vector (the natural unit of a difference of means).
    """

    direction: Float[Tensor, " d_in"]  # unit norm
    norm: float  # length before normalisation, in units of the activations
    hook_name: str
    model: str | None = None  # name of the model it was made for
    max_activation: float | None = None  # the length that "1max" stands for
    rms_norm: float | None = None  # the length that "1norm" stands for
    origin: dict[str, Any] = field(default_factory=dict)  # how it was made; JSON

    @classmethod
    def from_tensor(cls, vector: Tensor, hook_name: str, **known: Any) -> SteeringVector:
        """From a raw vector ``[d_in]``; its length is kept in ``norm``."""
        vector = vector.detach().float().cpu()
        if vector.ndim != 1 or not bool(vector.isfinite().all()):
            raise UserError(
                f"a steering vector is one row of finite numbers, not a tensor of shape {tuple(vector.shape)}"
            )
        known.setdefault("origin", {"kind": "tensor"})
        norm = float(vector.norm())
        if not 1e-15 < norm < math.inf:  # squares of such numbers are not in the range of float32
            wide = vector.double()
            norm = float(wide.norm())
            if norm == 0:
                raise UserError("a steering vector of zeros has no direction")
            return cls((wide / norm).float(), norm, hook_name, **known)
        return cls(vector / norm, norm, hook_name, **known)

    @classmethod
    def from_latent(
        cls, run: Run | SAE | Path | str, latent: int, pole: int = 1, hook_name: str = ""
    ) -> SteeringVector:
        """The dictionary row of a latent, negated for its negative pole (``pole=-1``).

        ``run`` is a run folder, an open :class:`~saelab.runs.Run`, or an SAE (then name the ``hook_name``).
        """
        source = as_run(run, hook_name)
        row = pole_sign(pole) * source.sae.W_dec[source.check_latent(latent)].detach()
        highest = source.max_activation(latent, pole)
        return cls.from_tensor(
            row,
            source.hook_name_out,
            model=source.model_name,
            max_activation=None if highest is None else highest * float(row.norm()),
            rms_norm=source.rms_norm,
            origin={"kind": "latent", "latent": latent, "pole": pole_sign(pole), **source.provenance()},
        )

    @classmethod
    def from_latents(
        cls, run: Run | SAE | Path | str, weights: Mapping[int, float], hook_name: str = ""
    ) -> SteeringVector:
        """A weighted sum of dictionary rows, ``{latent: weight}``; a negative weight takes the other pole."""
        source = as_run(run, hook_name)
        if not weights:
            raise UserError("from_latents needs at least one latent: {latent: weight}")
        rows = sum(weight * source.sae.W_dec[source.check_latent(latent)] for latent, weight in weights.items())
        return cls.from_tensor(
            torch.as_tensor(rows),
            source.hook_name_out,
            model=source.model_name,
            rms_norm=source.rms_norm,
            origin={"kind": "latents", "weights": {str(k): v for k, v in weights.items()}, **source.provenance()},
        )

    @property
    def vector(self) -> Float[Tensor, " d_in"]:
        """The raw vector: direction times norm."""
        return self.direction * self.norm

    @property
    def d_in(self) -> int:
        """Width of the activations it fits."""
        return self.direction.numel()

    def length(self, strength: Strength) -> float:
        """A strength as a signed length in units of the activations."""
        number, unit = parse_strength(strength)
        unit_length = {"": 1.0, "raw": self.norm, "max": self.max_activation, "norm": self.rms_norm}[unit]
        if unit_length is not None:
            return number * unit_length
        if unit == "norm":
            raise UserError(
                f"strength {strength!r} needs the norm of the activations, which this vector does not know; give an "
                "absolute strength, or set it with with_units(rms_norm=...)"
            )
        why = _why_no_max(self.origin)
        raise UserError(f"strength {strength!r} needs a maximum activation: {why}, or give an absolute strength")

    def with_units(self, max_activation: float | None = None, rms_norm: float | None = None) -> SteeringVector:
        """The same vector with the lengths that "1max" and "1norm" stand for."""
        return replace(
            self,
            max_activation=self.max_activation if max_activation is None else max_activation,
            rms_norm=self.rms_norm if rms_norm is None else rms_norm,
        )

    def cosine(self, other: SteeringVector) -> float:
        """Cosine similarity with another vector of the same width."""
        return float(self.direction @ other.direction)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._combine(other, 1.0, "sum")

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._combine(other, -1.0, "difference")

    def __mul__(self, factor: float) -> SteeringVector:
        """Scales the raw vector; a negative factor reverses the direction, whose largest activation is not known."""
        if factor == 0 or not math.isfinite(factor):
            raise UserError(f"a steering vector cannot be multiplied by {factor}; use strength 0 to switch it off")
        origin = {"kind": "multiple", "factor": float(factor), "of": self.origin}
        return replace(
            self,
            direction=self.direction * math.copysign(1.0, factor),
            norm=self.norm * abs(factor),
            max_activation=self.max_activation if factor > 0 else None,
            origin=origin,
        )

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def _combine(self, other: SteeringVector, sign: float, kind: str) -> SteeringVector:
        if self.d_in != other.d_in or self.hook_name != other.hook_name:
            raise UserError(
                f"cannot combine vectors of {self.hook_name} (width {self.d_in}) and {other.hook_name} "
                f"(width {other.d_in}); apply them as two interventions"
            )
        if self.model and other.model and self.model != other.model:
            raise UserError(f"cannot combine vectors of two models, {self.model} and {other.model}")
        return SteeringVector.from_tensor(
            self.vector + sign * other.vector,
            self.hook_name,
            model=self.model or other.model,
            rms_norm=self.rms_norm or other.rms_norm,
            origin={"kind": kind, "of": [self.origin, other.origin]},
        )


def _why_no_max(origin: Mapping[str, Any]) -> str:
    """Why a vector of this origin has no maximum activation, with the remedy."""
    while origin.get("kind") == "multiple":
        if origin["factor"] < 0:
            return "the vector was reversed, and has none that way; reverse the strength of the original instead"
        origin = origin["of"]
    if origin.get("kind") != "latent":
        return "only a single latent has a maximum; set one with with_units(max_activation=...)"
    run = origin.get("run")
    if run is None:
        return "the SAE has no feature index; set it with with_units(max_activation=...)"
    sign = "+" if pole_sign(origin["pole"]) > 0 else "-"
    if not Path(run).is_dir():  # a recipe keeps the name of a run alone
        return (
            f"{run} had no feature index when the recipe was made, or its latent {origin['latent']} never fires on its "
            f"{sign} pole there; make the recipe again from an indexed run"
        )
    if not (Path(run) / layout.INDEX / layout.FEATURES).is_file():
        return f"{run} has no feature index; build it with `saelab index {run} --cache CACHE`"
    return f"latent {origin['latent']} never fires on its {sign} pole in the feature index"


def parse_strength(strength: Strength) -> tuple[float, str]:
    """A strength's number and its unit: ``"0.8max"`` is ``(0.8, "max")``, a bare number has the unit ``""``."""
    if isinstance(strength, (int, float)):
        number, unit = float(strength), ""
    else:
        match = _STRENGTH.fullmatch(strength.strip().lower())
        if match is None or (match[2] and match[2] not in _UNITS):
            raise UserError(f"strength {strength!r} is not a number or a number with one of {', '.join(_UNITS)}")
        number, unit = float(match[1]), _UNITS.get(match[2], "")
    if not math.isfinite(number):
        raise UserError(f"strength {strength!r} is not finite")
    return number, unit


def pole_sign(pole: int | str) -> int:
    """``+1`` or ``-1`` from ``1``, ``-1``, ``"+"`` or ``"-"``."""
    sign = {"+": 1, "-": -1, "1": 1, "+1": 1, "-1": -1}.get(str(pole))
    if sign is None:
        raise UserError(f"pole {pole!r} is neither + nor -")
    return sign
